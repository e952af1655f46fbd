//! What the image promises, tried on random catalogs: one place for every byte, no place for two, order and alignment.

use proptest::prelude::*;

use super::*;
use crate::model::DType;
use crate::plan::testing::{NASTY, any_case, even_catalog, with_tensors};
use crate::units::{MIB, PAGE_2M};

/// Types and row lengths that need zeros behind them, and some that do not.
const KINDS: [(DType, u64); 6] = [
    (DType::Q4_0, 96),
    (DType::F32, 100),
    (DType::Q4_K, 768),
    (DType::Q6_K, 512),
    (DType::BF16, 31),
    (DType::Q8_0, 1056),
];

fn image_of(catalog: &Catalog) -> Image {
    Image::new(catalog, PAGE_2M).unwrap()
}

/// Every piece of an image, by place.
fn all_pieces(image: &Image) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = image.pieces.iter().flatten().copied().collect();
    pieces.sort_unstable_by_key(|piece| piece.offset_bytes);
    pieces
}

proptest! {
    #[test]
    fn every_byte_has_one_place_and_no_place_has_two(case in any_case(NASTY)) {
        let catalog = with_tensors(case.0, &KINDS);
        let image = image_of(&catalog);
        let pieces = all_pieces(&image);
        for pair in pieces.windows(2) {
            prop_assert!(pair[0].end_bytes() <= pair[1].offset_bytes, "{pair:?}");
        }
        prop_assert!(pieces.last().is_none_or(|last| last.end_bytes() <= image.len_bytes));
        prop_assert_eq!(image.len_bytes % PAGE_2M, 0);
        let mut padding = 0;
        for (layer, placed) in catalog.layers.iter().zip(&image.pieces) {
            let mut found: Vec<Extent> = placed.iter().map(|piece| piece.file).collect();
            found.sort_unstable();
            let mut wanted: Vec<Extent> = layer.uses.iter().map(|used| used.extent).collect();
            wanted.retain(|extent| extent.len_bytes > 0);
            wanted.sort_unstable();
            prop_assert_eq!(found, wanted);
            if let Some(first) = placed.first() {
                prop_assert_eq!(first.offset_bytes % PAGE_2M, 0, "a layer begins at a page");
            }
            for piece in placed {
                prop_assert_eq!(piece.offset_bytes % ALIGN_BYTES, 0);
                let used = layer.uses.iter().find(|used| used.extent == piece.file).unwrap();
                let tensor = &catalog.tensors[used.tensor_index as usize];
                prop_assert_eq!(piece.padding_bytes, padding_bytes(tensor));
                padding += piece.padding_bytes;
            }
        }
        prop_assert_eq!(image.padding_bytes, padding);
    }

    /// Pages of a layer, cut anywhere, are its pieces again.
    #[test]
    fn runs_cut_pieces_and_lose_nothing(case in any_case(NASTY), cuts in prop::collection::vec(0..60u64, 0..4)) {
        let catalog = with_tensors(case.0, &KINDS);
        let image = image_of(&catalog);
        let pages = image.len_bytes / PAGE_2M;
        let mut ends: Vec<u64> = cuts.iter().map(|cut| cut % (pages + 1)).collect();
        ends.extend([0, pages]);
        ends.sort_unstable();
        for (layer, whole) in image.pieces.iter().enumerate() {
            let (mut file_bytes, mut padding) = (0, 0);
            for pair in ends.windows(2) {
                let run = PageRun { shard_index: 0, first_page: pair[0], page_count: pair[1] - pair[0] };
                for part in image.pieces_in(layer, &run, PAGE_2M) {
                    prop_assert!(run.first_page * PAGE_2M <= part.offset_bytes);
                    prop_assert!(part.end_bytes() <= run.end_page() * PAGE_2M);
                    let source = whole.iter().find(|piece| {
                        (piece.offset_bytes..piece.end_bytes()).contains(&part.offset_bytes)
                    }).unwrap();
                    if part.file.len_bytes > 0 {
                        let skip = part.offset_bytes - source.offset_bytes;
                        prop_assert_eq!(part.file.offset_bytes, source.file.offset_bytes + skip);
                    }
                    file_bytes += part.file.len_bytes;
                    padding += part.padding_bytes;
                }
            }
            prop_assert_eq!(file_bytes, whole.iter().map(|piece| piece.file.len_bytes).sum::<u64>());
            prop_assert_eq!(padding, whole.iter().map(|piece| piece.padding_bytes).sum::<u64>());
        }
    }
}

#[test]
fn bytes_of_the_files_are_found_in_the_image() {
    let catalog = with_tensors(even_catalog(5, &[(0, 5000), (1, 3 * MIB)]), &KINDS);
    let image = image_of(&catalog);
    let places = Places::new(&image);
    for piece in image.pieces.iter().flatten() {
        for skip in [0, 1, piece.file.len_bytes - 1] {
            let found = places.of(0, piece.file.offset_bytes + skip);
            assert_eq!(found, Some(piece.offset_bytes + skip));
        }
    }
    assert_eq!(places.of(0, catalog.shards[0].len_bytes), None);
    assert_eq!(places.of(1, 0), None);
}

#[test]
fn the_zeros_are_those_that_ggml_asks_for() {
    let catalog = with_tensors(even_catalog(1, &[(0, 1000); 6]), &KINDS);
    let bytes: Vec<u64> = catalog.tensors.iter().map(padding_bytes).collect();
    // 512 - 96 = 416 elements of q4_0 are 13 blocks of 18 bytes; 256 of q4_K one of 144; 512 - 32 = 480 of q8_0 15 of 34.
    assert_eq!(bytes, [13 * 18, 0, 144, 0, 0, 15 * 34]);
}

#[test]
fn a_cut_tensor_stays_in_one_piece_and_its_zeros_follow_its_end() {
    let mut catalog = with_tensors(
        even_catalog(3, &[(0, 300), (1, 5 * MIB), (2, 77)]),
        &[(DType::Q4_0, 96)],
    );
    // Tensor 4 is the middle one of layer 1: it goes on in layer 2, in the place of that layer's middle one.
    let whole = catalog.tensors[4].extent;
    let first = Extent {
        len_bytes: 2 * MIB + 54,
        ..whole
    };
    let rest = Extent {
        offset_bytes: first.end_bytes(),
        len_bytes: whole.len_bytes - first.len_bytes,
        ..whole
    };
    catalog.layers[1].uses[1].extent = first;
    catalog.layers[2].uses[1].extent = rest;
    catalog.layers[2].uses[1].tensor_index = 4;
    let image = image_of(&catalog);
    let (head, tail) = (image.pieces[1][2], image.pieces[2][0]);
    assert_eq!((head.file, tail.file), (first, rest));
    assert_eq!(tail.offset_bytes, head.offset_bytes + first.len_bytes);
    assert_eq!((head.padding_bytes, tail.padding_bytes), (0, 13 * 18));
    assert_eq!(head.offset_bytes % ALIGN_BYTES, 0);
    assert_eq!(image.pieces[1][0].offset_bytes % PAGE_2M, 0);
    assert_ne!(tail.offset_bytes % PAGE_2M, 0);
}

#[test]
fn impossible_pages_are_refused() {
    let catalog = even_catalog(2, &[(0, 1000)]);
    for page_bytes in [0, 64, 3 << 20] {
        let error = Image::new(&catalog, page_bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}
