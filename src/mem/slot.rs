//! A slot of the private backing: pages whose order never changes, in as few mappings as the lengths of its runs allow.
//!
//! Page k of a slot that serves a run of n pages lies at the run's place when k < n, else at place k of the slot's own
//! parking range. See [`super::private`], whose part it is. Place in
//! `file -> catalog -> plan -> reader -> pool -> lease -> host`: the default pool.
#![allow(unsafe_code)]

use super::host::{self, Protection};
use super::pool::Geometry;
use crate::error::Result;

/// A fixed part of the pool. See the module's head.
#[derive(Debug)]
pub(super) struct Slot {
    /// Where its page 0 is parked.
    pub(super) parking: usize,
    /// How many pages it has.
    pub(super) page_count: u64,
    pub(super) pieces: Vec<Piece>,
    pub(super) aimed: Option<Aim>,
    /// It lies where the first pass will want it, and nobody has aimed it yet: it may be parked again.
    pub(super) unused: bool,
    pub(super) quarantined: bool,
}

/// Pages of a slot that lie in one mapping.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) first_page: u64,
    pub(super) page_count: u64,
    pub(super) address: usize,
}

/// What a slot serves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aim {
    pub(super) address: usize,
    pub(super) len: usize,
    pub(super) shard_index: u32,
}

impl Slot {
    /// True when a piece of it lies in the range.
    pub(super) fn touches(&self, geometry: &Geometry, address: usize, len: usize) -> bool {
        self.pieces.iter().any(|piece| {
            piece.address < address + len
                && address < piece.address + geometry.bytes(piece.page_count)
        })
    }

    /// Moves the first `page_count` pages to `place` and the others to the parking range.
    pub(super) fn lay_out(
        &mut self,
        geometry: &Geometry,
        place: usize,
        page_count: u64,
    ) -> Result<()> {
        self.cut(geometry, page_count);
        let parking = self.parking;
        let goal = |piece: &Piece| {
            let base = if piece.first_page < page_count {
                place
            } else {
                parking
            };
            base + geometry.bytes(piece.first_page)
        };
        let home = |piece: &Piece| parking + geometry.bytes(piece.first_page);
        for piece in &self.pieces {
            if piece.address != goal(piece) && piece.address != home(piece) {
                // SAFETY: the slot's own pages, with no lease and no read on them (the caller's part).
                unsafe {
                    host::protect(
                        piece.address,
                        geometry.bytes(piece.page_count),
                        Protection::None,
                    )?;
                }
            }
        }
        for piece in &mut self.pieces {
            let (from, to) = (piece.address, goal(piece));
            if from == to {
                continue;
            }
            let len = geometry.bytes(piece.page_count);
            // SAFETY: both ranges are the slot's: its pages and the place that check_free_place found empty, or its own
            // parking; they do not overlap, and no read is in flight (the caller's part).
            unsafe {
                host::move_pages(from, to, len)?;
                piece.address = to;
                host::reserve_fixed(from, len)?;
            }
        }
        Ok(())
    }

    /// Makes page `at` the first of a piece. Half a mapping lies in one mapping too.
    fn cut(&mut self, geometry: &Geometry, at: u64) {
        let inside =
            |piece: &Piece| piece.first_page < at && at < piece.first_page + piece.page_count;
        if let Some(index) = self.pieces.iter().position(inside) {
            let piece = &mut self.pieces[index];
            let keep = at - piece.first_page;
            let rest = Piece {
                first_page: at,
                page_count: piece.page_count - keep,
                address: piece.address + geometry.bytes(keep),
            };
            piece.page_count = keep;
            self.pieces.insert(index + 1, rest);
        }
    }
}
