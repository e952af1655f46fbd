//! The cut of the output head: a matrix larger than the largest block layer is used in pieces of whole rows.
//!
//! Invariant (bit-identity): ggml's matrix kernels choose their path by the number of rows modulo 16, 8 and 4, so every piece
//! must take the path the whole would take. Rows that are a multiple of 16 (8, 4) are cut at multiples of 16 (8, 4); rows that
//! are no multiple of 4 are cut so that no piece is one either, the last included. Pieces are equal but for the last, so a
//! row's piece is a division away.
//! Place in the house: **file -> catalog** -> plan -> reader -> pool -> lease -> host.

/// Pieces one head may have: more would only make layers smaller than a page of requests.
const PIECE_COUNT_MAX: u64 = 1024;

/// Rows per piece for a matrix of `rows` rows of `row_bytes`, so that no piece is larger than `piece_bytes_max`, and
/// `first_extra_bytes` (norm and bias) fit with the first. As few pieces as that takes, as equal as the rule allows; `None`
/// when it should stay whole, because it fits or cannot be cut.
pub(crate) fn rows_per_piece(
    rows: u64,
    row_bytes: u64,
    first_extra_bytes: u64,
    piece_bytes_max: u64,
) -> Option<u64> {
    let total = rows
        .checked_mul(row_bytes)?
        .checked_add(first_extra_bytes)?;
    if total <= piece_bytes_max || piece_bytes_max == 0 || rows < 2 {
        return None;
    }
    let fewest = total.div_ceil(piece_bytes_max).min(PIECE_COUNT_MAX);
    let mut best = None;
    for pieces in fewest..=PIECE_COUNT_MAX.min(rows) {
        let Some(per_piece) = legal_rows(rows, pieces) else {
            continue;
        };
        best = Some(per_piece);
        if per_piece * row_bytes + first_extra_bytes <= piece_bytes_max {
            break;
        }
    }
    best
}

/// The smallest legal piece for at most `pieces` pieces; `None` when that is the whole.
fn legal_rows(rows: u64, pieces: u64) -> Option<u64> {
    let unit = [16, 8, 4]
        .into_iter()
        .find(|unit| rows.is_multiple_of(*unit));
    let smallest = rows.div_ceil(pieces);
    let per_piece = match unit {
        Some(unit) => smallest.div_ceil(unit) * unit,
        None => (smallest..rows).find(|size| {
            let last = rows - (rows.div_ceil(*size) - 1) * size;
            !size.is_multiple_of(4) && !last.is_multiple_of(4)
        })?,
    };
    (per_piece < rows).then_some(per_piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(rows: u64, per_piece: u64) -> Vec<u64> {
        (0..rows.div_ceil(per_piece))
            .map(|index| per_piece.min(rows - index * per_piece))
            .collect()
    }

    #[test]
    fn a_head_that_fits_stays_whole() {
        assert_eq!(rows_per_piece(32_000, 100, 0, 3_200_000), None);
        assert_eq!(rows_per_piece(32_000, 100, 0, 0), None);
        assert_eq!(rows_per_piece(1, 100, 0, 10), None);
    }

    #[test]
    fn familiar_vocabularies() {
        // Llama 3: 128256 = 16 * 8016 rows; two thirds of a head fit.
        assert_eq!(rows_per_piece(128_256, 1000, 0, 100_000_000), Some(64_128));
        // 32003 is odd: no piece may be a multiple of four.
        let per_piece = rows_per_piece(32_003, 10, 0, 100_000).unwrap();
        assert_eq!(pieces(32_003, per_piece), [8002, 8002, 8002, 7997]);
        // The norm has to fit with the first piece.
        assert_eq!(rows_per_piece(1600, 10, 100, 8100), Some(800));
        assert_eq!(rows_per_piece(1600, 10, 101, 8100), Some(544));
    }

    proptest! {
        #[test]
        fn every_piece_takes_the_path_of_the_whole(
            rows in 2_u64..300_000, row_bytes in 1_u64..10_000, extra in 0_u64..5000, max in 1_u64..1_000_000_000,
        ) {
            let Some(per_piece) = rows_per_piece(rows, row_bytes, extra, max) else {
                return Ok(());
            };
            let sizes = pieces(rows, per_piece);
            prop_assert!(sizes.len() >= 2 && sizes.len() as u64 <= PIECE_COUNT_MAX);
            prop_assert_eq!(sizes.iter().sum::<u64>(), rows);
            for size in sizes {
                for unit in [16, 8, 4] {
                    if rows % unit == 0 {
                        prop_assert_eq!(size % unit, 0);
                        break;
                    }
                    prop_assert!(unit != 4 || size % 4 != 0);
                }
            }
        }

        #[test]
        fn pieces_fit_where_sixteen_rows_do(
            units in 1_u64..20_000, row_bytes in 1_u64..10_000, extra in 0_u64..5000, share in 2_u64..500,
        ) {
            let rows = units * 16;
            let max = (rows * row_bytes / share).max(16 * row_bytes + extra);
            if let Some(per_piece) = rows_per_piece(rows, row_bytes, extra, max) {
                // Sixteen rows each would be too many pieces for a head of more: then the limit on pieces wins.
                let too_many = units > PIECE_COUNT_MAX;
                prop_assert!(too_many || per_piece * row_bytes + extra <= max);
            }
        }
    }
}
