//! The keys or the values of one layer: a place in memory, a range of the spill file that mirrors it, and what of it is
//! coded there.
//!
//! A tensor is rows, one per cell of the cache. Rows on the drive lie at the same offset as in memory, so pages go out
//! and come in by O_DIRECT without a copy. With a codec, groups of rows that nobody will write again take the place of
//! their own raw bytes as a frame; a group that is written again after all stays raw for good, so that nothing is ever
//! coded twice. What comes back is held against a checksum for each page: a drive that lies is an error, not another
//! answer. Invariants: memory behind the last row that was written is zero, as it is without a drive; what is in memory after a
//! group was coded is what the drive will give back, so the output does not depend on when a layer was moved.
#![allow(unsafe_code)]

use std::ops::Range;

use half::f16;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{AlignedMemory, SpillFile};
use crate::kv::frame::Sum;
use crate::kv::{Choice, Coder, Spec, Values};
use crate::mem::Place;
use crate::units::PAGE_4K;

/// Rows coded together: 64 KiB to 1 MiB of raw bytes in the models there are.
pub const GROUP_ROWS: u64 = 128;
/// The last rows stay exact: attention looks at them most.
pub const RECENT_ROWS: u64 = 128;
/// The first group stays exact: attention sinks into its first rows.
const SINK_GROUPS: usize = 1;
/// One read or write; between two of them a stop is seen.
const REQUEST_BYTES: usize = 16 << 20;

/// What was moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read from the drive.
    pub bytes_read: u64,
    /// Written to it.
    pub bytes_written: u64,
    /// Frames that were written.
    pub coded_bytes: u64,
    /// What they were in memory.
    pub raw_bytes: u64,
}

impl Traffic {
    /// Counts more of it.
    pub const fn add(&mut self, more: &Self) {
        self.bytes_read += more.bytes_read;
        self.bytes_written += more.bytes_written;
        self.coded_bytes += more.coded_bytes;
        self.raw_bytes += more.raw_bytes;
    }
}

/// A group of rows on the drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// Raw, and may be coded.
    Exact,
    /// A frame of so many bytes.
    Coded(usize),
    /// Raw for good.
    Kept,
}

#[derive(Debug)]
struct Coding {
    coder: Coder,
    groups: Vec<Group>,
    values: Vec<f32>,
    frame: AlignedMemory,
}

/// See the module's head.
#[derive(Debug)]
pub struct Part {
    place: Place,
    row_bytes: usize,
    offset_bytes: u64,
    written_rows: u64,
    /// Memory behind it is zero.
    filled_bytes: usize,
    /// Of each page on the drive that holds raw rows.
    sums: Vec<u32>,
    coding: Option<Coding>,
}

fn page_sum(page: &[u8]) -> u32 {
    let mut sum = Sum::default();
    sum.add(page);
    sum.finish()
}

fn whole_pages(len: usize) -> usize {
    len.next_multiple_of(PAGE_4K as usize)
}

impl Part {
    /// `rows_count` rows of `row_bytes` bytes; on the drive from `offset_bytes` on.
    ///
    /// # Errors
    /// `NoMemory` when the address space is short; `Unsupported` for rows that the codec cannot take.
    pub fn new(
        rows_count: u64,
        row_bytes: u64,
        offset_bytes: u64,
        codec: Option<(Choice, usize)>,
    ) -> Result<Self> {
        let place = Place::reserve(rows_count.saturating_mul(row_bytes))?;
        let coding = codec
            .map(|(choice, heads)| Coding::new(choice, heads, rows_count, row_bytes))
            .transpose()?;
        let pages_count = place.len_bytes() / PAGE_4K as usize;
        Ok(Self {
            place,
            sums: vec![0; pages_count],
            row_bytes: row_bytes as usize,
            offset_bytes,
            written_rows: 0,
            filled_bytes: 0,
            coding,
        })
    }

    /// Where the host sees it.
    pub const fn address(&self) -> usize {
        self.place.address()
    }

    /// Bytes of memory, and of the drive, that it takes at most.
    pub const fn len_bytes(&self) -> u64 {
        self.place.len_bytes() as u64
    }

    /// Bytes of rows that were ever written.
    pub fn written_bytes(&self) -> usize {
        self.row_at(self.written_rows)
    }

    /// Takes note of rows that the host has written.
    fn note(&mut self, rows: &Range<u64>) -> Range<u64> {
        // Rows that were passed over count as written: everything up to the last row has to be on the drive.
        let start = rows.start.min(self.written_rows);
        self.written_rows = self.written_rows.max(rows.end);
        self.filled_bytes = self.filled_bytes.max(self.row_at(rows.end));
        let mut rows = start..rows.end;
        if let Some(coding) = &mut self.coding {
            let first = (rows.start / GROUP_ROWS) as usize;
            let end = rows.end.div_ceil(GROUP_ROWS) as usize;
            for index in first..end.min(coding.groups.len()) {
                if matches!(coding.groups[index], Group::Coded(_)) {
                    // The frame goes: all of the group has to be written raw.
                    coding.groups[index] = Group::Kept;
                    rows.start = rows.start.min(index as u64 * GROUP_ROWS);
                    rows.end = rows.end.max((index as u64 + 1) * GROUP_ROWS);
                }
            }
            rows.end = rows.end.min(self.written_rows);
        }
        rows
    }

    fn row_at(&self, row: u64) -> usize {
        (row as usize * self.row_bytes).min(self.place.len_bytes())
    }

    /// Brings rows that were written to the drive. Nobody computes with the layer meanwhile.
    ///
    /// # Errors
    /// What the drive says.
    pub fn write_back(
        &mut self,
        spill: &SpillFile,
        rows: &Range<u64>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let rows = self.note(rows);
        let start = self.row_at(rows.start) / PAGE_4K as usize * PAGE_4K as usize;
        let end = whole_pages(self.row_at(rows.end));
        self.write_raw(spill, start..end, traffic)
    }

    fn write_raw(
        &mut self,
        spill: &SpillFile,
        bytes: Range<usize>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            let len = REQUEST_BYTES.min(bytes.end - at);
            // SAFETY: nobody computes with the layer while it is at work.
            let piece = unsafe { self.place.bytes(at, len)? };
            let sums = &mut self.sums[at / PAGE_4K as usize..];
            for (sum, page) in sums.iter_mut().zip(piece.chunks_exact(PAGE_4K as usize)) {
                *sum = page_sum(page);
            }
            spill.write_at(self.offset_bytes + at as u64, piece)?;
            traffic.bytes_written += len as u64;
            at += len;
        }
        Ok(())
    }

    /// Codes the groups that are complete, in memory and on the drive, and writes the rest raw.
    ///
    /// # Errors
    /// What the drive or the codec says.
    pub fn settle(
        &mut self,
        spill: &SpillFile,
        rows: &Range<u64>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let rows = self.note(rows);
        let complete = (self.written_rows.saturating_sub(RECENT_ROWS) / GROUP_ROWS) as usize;
        let groups_count = self.coding.as_ref().map_or(0, |coding| coding.groups.len());
        for index in SINK_GROUPS..complete.min(groups_count) {
            self.code_group(index, spill, traffic)?;
        }
        // What is left raw, page by page: groups begin at pages, so no page belongs to a frame and to raw rows.
        let mut row = rows.start;
        while row < rows.end {
            let index = (row / GROUP_ROWS) as usize;
            let end = rows.end.min((index as u64 + 1) * GROUP_ROWS);
            if !self.is_coded(index) {
                let start = self.row_at(row) / PAGE_4K as usize * PAGE_4K as usize;
                self.write_raw(spill, start..whole_pages(self.row_at(end)), traffic)?;
            }
            row = end;
        }
        Ok(())
    }

    fn is_coded(&self, group: usize) -> bool {
        let coding = self.coding.as_ref();
        coding
            .and_then(|coding| coding.groups.get(group))
            .is_some_and(|group| matches!(group, Group::Coded(_)))
    }

    fn group_bytes(&self, group: usize) -> Range<usize> {
        let group_bytes = GROUP_ROWS as usize * self.row_bytes;
        group * group_bytes..((group + 1) * group_bytes).min(self.place.len_bytes())
    }

    fn code_group(&mut self, index: usize, spill: &SpillFile, traffic: &mut Traffic) -> Result<()> {
        let range = self.group_bytes(index);
        let offset_bytes = self.offset_bytes + range.start as u64;
        let Some(coding) = &mut self.coding else {
            return Ok(());
        };
        if coding.groups[index] != Group::Exact {
            return Ok(());
        }
        // SAFETY: nobody computes with the layer while it is at work.
        let raw = unsafe { self.place.bytes_mut(range.start, range.len())? };
        let frame = coding
            .coder
            .encode(Values::F16(bytemuck::cast_slice(raw)))?;
        if whole_pages(frame.len()) > raw.len() {
            coding.groups[index] = Group::Kept;
            return self.write_raw(spill, range, traffic);
        }
        let padded = whole_pages(frame.len());
        let bytes = &mut coding.frame.bytes_mut()[..padded];
        bytes[..frame.len()].copy_from_slice(&frame);
        bytes[frame.len()..].fill(0);
        spill.write_at(offset_bytes, bytes)?;
        coding.coder.decode_into(&frame, &mut coding.values)?;
        put(&coding.values, bytemuck::cast_slice_mut(raw));
        coding.groups[index] = Group::Coded(frame.len());
        traffic.bytes_written += padded as u64;
        traffic.coded_bytes += frame.len() as u64;
        traffic.raw_bytes += range.len() as u64;
        Ok(())
    }

    /// Gets memory, that of `other` where it has some to give and is as long.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open_with(&mut self, other: Option<&mut Self>) -> Result<()> {
        match other {
            Some(other) if other.place.len_bytes() == self.place.len_bytes() => {
                self.place.open_with(&mut other.place)?;
                self.filled_bytes = std::mem::take(&mut other.filled_bytes);
                Ok(())
            }
            Some(other) => {
                other.close()?;
                self.place.open()
            }
            None => self.place.open(),
        }
    }

    /// Gives its memory back.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn close(&mut self) -> Result<()> {
        self.filled_bytes = 0;
        self.place.close()
    }

    /// Forgets all rows, on the drive and in memory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear(&mut self) -> Result<()> {
        self.written_rows = 0;
        if let Some(coding) = &mut self.coding {
            coding.groups.fill(Group::Exact);
        }
        self.close()
    }

    /// Reads every row that was ever written into its memory.
    ///
    /// # Errors
    /// What the drive says; `Checksum` for a frame that is not what was written.
    pub fn load(
        &mut self,
        spill: &SpillFile,
        goes_on: &dyn Fn() -> bool,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let end = whole_pages(self.written_bytes());
        self.place.populate(end)?;
        let mut at = 0;
        let mut group = 0;
        while at < end {
            if self.is_coded(group) {
                at = self.read_group(group, spill, traffic)?;
                group += 1;
                continue;
            }
            let mut until = end;
            if self.coding.is_some() {
                // As many groups as are raw in a row.
                while !self.is_coded(group) && self.group_bytes(group).start < end {
                    until = self.group_bytes(group).end.min(end);
                    group += 1;
                }
            }
            self.read_raw(spill, at..until, goes_on, traffic)?;
            at = until;
        }
        if self.filled_bytes > end {
            let stale = self.filled_bytes - end;
            // SAFETY: nobody computes with the layer while it is at work.
            unsafe { self.place.bytes_mut(end, stale)? }.fill(0);
        }
        self.filled_bytes = end;
        Ok(())
    }

    fn read_raw(
        &mut self,
        spill: &SpillFile,
        bytes: Range<usize>,
        goes_on: &dyn Fn() -> bool,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let mut at = bytes.start;
        while at < bytes.end {
            if !goes_on() {
                return Err(Error::new(ErrorKind::Canceled, "stopped"));
            }
            let len = REQUEST_BYTES.min(bytes.end - at);
            // SAFETY: nobody computes with the layer while it is at work.
            let piece = unsafe { self.place.bytes_mut(at, len)? };
            spill.read_at(self.offset_bytes + at as u64, piece)?;
            let sums = &self.sums[at / PAGE_4K as usize..];
            let pages = piece.chunks_exact(PAGE_4K as usize);
            if let Some(bad) = pages
                .zip(sums)
                .position(|(page, sum)| page_sum(page) != *sum)
            {
                let offset_bytes = self.offset_bytes + (at + bad * PAGE_4K as usize) as u64;
                return Err(Error::new(
                    ErrorKind::Checksum,
                    format!(
                        "keys and values at {offset_bytes} of the nameless file came back other than they were written; look at the drive"
                    ),
                ));
            }
            traffic.bytes_read += len as u64;
            at += len;
        }
        Ok(())
    }

    /// Reads a frame to where its rows are in memory; gives where they end.
    fn read_group(
        &mut self,
        index: usize,
        spill: &SpillFile,
        traffic: &mut Traffic,
    ) -> Result<usize> {
        let range = self.group_bytes(index);
        let offset_bytes = self.offset_bytes + range.start as u64;
        if let Some(coding) = &mut self.coding
            && let Group::Coded(len) = coding.groups[index]
        {
            let padded = whole_pages(len);
            let bytes = &mut coding.frame.bytes_mut()[..padded];
            spill.read_at(offset_bytes, bytes)?;
            traffic.bytes_read += padded as u64;
            coding
                .coder
                .decode_into(&bytes[..len], &mut coding.values)?;
            // SAFETY: nobody computes with the layer while it is at work.
            let raw = unsafe { self.place.bytes_mut(range.start, range.len())? };
            put(&coding.values, bytemuck::cast_slice_mut(raw));
        }
        Ok(range.end)
    }
}

impl Coding {
    fn new(choice: Choice, heads: usize, rows_count: u64, row_bytes: u64) -> Result<Self> {
        let row = row_bytes as usize / size_of::<f16>();
        if heads == 0 || !row.is_multiple_of(heads) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "--kv-type {choice}: rows of {row} values are no {heads} heads; this model keeps its keys and values exact with --kv-type f16"
                ),
            ));
        }
        let coder = Coder::new(Spec::new(choice.codec, choice.rate, row / heads)?)?;
        let group_bytes = GROUP_ROWS * row_bytes;
        Ok(Self {
            coder,
            groups: vec![Group::Exact; (rows_count / GROUP_ROWS) as usize],
            values: vec![0.0; GROUP_ROWS as usize * row],
            frame: AlignedMemory::new(group_bytes, PAGE_4K)?,
        })
    }
}

fn put(values: &[f32], halves: &mut [f16]) {
    for (half, value) in halves.iter_mut().zip(values) {
        *half = f16::from_f32(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: usize = 128;

    fn write(part: &mut Part, rows: Range<u64>, seed: u64) {
        for row in rows {
            // SAFETY: only this test knows the part.
            let bytes = unsafe { part.place.bytes_mut(row as usize * 2 * ROW, 2 * ROW) }.unwrap();
            for (index, half) in bytemuck::cast_slice_mut::<u8, f16>(bytes)
                .iter_mut()
                .enumerate()
            {
                let value = ((row * 131 + index as u64 * 17 + seed) % 997) as f32 / 500.0 - 1.0;
                *half = f16::from_f32(value);
            }
        }
    }

    fn all(part: &Part) -> Vec<u8> {
        // SAFETY: only this test knows the part.
        unsafe { part.place.bytes(0, part.place.len_bytes()) }
            .unwrap()
            .to_vec()
    }

    fn spill(parts: u64, len: u64) -> SpillFile {
        let spill = SpillFile::create(&std::env::temp_dir()).unwrap();
        spill.set_len(parts * len, false).unwrap();
        spill
    }

    /// Two parts take turns in one memory, rows are added in between: always the bytes that were written, and zeros.
    #[test]
    fn raw_rows_come_back_as_they_were() {
        let new = |offset| Part::new(600, 2 * ROW as u64 + 34, offset, None).unwrap();
        let (mut one, mut two) = (new(0), new(256 << 10));
        let spill = spill(2, 256 << 10);
        let mut traffic = Traffic::default();
        one.open_with(None).unwrap();
        // SAFETY: only this test knows the part.
        unsafe { one.place.bytes_mut(0, 70 * 290) }.unwrap().fill(5);
        let first = all(&one);
        one.write_back(&spill, &(0..70), &mut traffic).unwrap();
        two.open_with(Some(&mut one)).unwrap();
        two.load(&spill, &|| true, &mut traffic).unwrap();
        assert!(all(&two).iter().all(|byte| *byte == 0), "stale bytes");
        // SAFETY: as above.
        unsafe { two.place.bytes_mut(0, 300 * 290) }
            .unwrap()
            .fill(6);
        let second = all(&two);
        two.write_back(&spill, &(0..300), &mut traffic).unwrap();
        one.open_with(Some(&mut two)).unwrap();
        one.load(&spill, &|| true, &mut traffic).unwrap();
        assert_eq!(all(&one), first);
        // SAFETY: as above.
        unsafe { one.place.bytes_mut(70 * 290, 290) }
            .unwrap()
            .fill(7);
        let third = all(&one);
        let before = traffic.bytes_written;
        one.write_back(&spill, &(70..71), &mut traffic).unwrap();
        assert!(traffic.bytes_written - before <= 8192, "only what is new");
        two.open_with(Some(&mut one)).unwrap();
        two.load(&spill, &|| true, &mut traffic).unwrap();
        assert_eq!(all(&two), second);
        one.open_with(Some(&mut two)).unwrap();
        one.load(&spill, &|| true, &mut traffic).unwrap();
        assert_eq!(all(&one), third);
    }

    #[test]
    fn a_drive_that_lies_is_noticed() {
        let mut part = Part::new(600, 256, 0, None).unwrap();
        let spill = spill(1, part.len_bytes());
        let mut traffic = Traffic::default();
        part.open_with(None).unwrap();
        write(&mut part, 100..600, 0);
        // The first rows were passed over: they come back as well.
        part.write_back(&spill, &(100..600), &mut traffic).unwrap();
        part.load(&spill, &|| true, &mut traffic).unwrap();
        let mut page = AlignedMemory::new(PAGE_4K, PAGE_4K).unwrap();
        let bytes = &mut page.bytes_mut()[..4096];
        spill.read_at(2 * PAGE_4K, bytes).unwrap();
        bytes[4095] ^= 1;
        spill.write_at(2 * PAGE_4K, bytes).unwrap();
        let error = part.load(&spill, &|| true, &mut traffic).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Checksum);
        assert!(error.to_string().contains("8192"), "{error}");
    }

    #[test]
    fn coded_rows_come_back_as_memory_has_them() {
        let codec = Some(("tq:4".parse().unwrap(), 2));
        let mut part = Part::new(1024, 2 * ROW as u64, 0, codec).unwrap();
        let spill = spill(1, part.len_bytes());
        let mut traffic = Traffic::default();
        part.open_with(None).unwrap();
        write(&mut part, 0..700, 0);
        let exact = all(&part);
        part.settle(&spill, &(0..700), &mut traffic).unwrap();
        let coded = all(&part);
        let row = |number: usize| number * 2 * ROW;
        // 700 - 128 rows are 4 whole groups, of which the first stays.
        assert_eq!(traffic.raw_bytes, 3 * 128 * 2 * ROW as u64);
        assert!(traffic.coded_bytes * 3 < traffic.raw_bytes);
        assert_eq!(coded[..row(128)], exact[..row(128)]);
        assert_ne!(coded[row(128)..row(512)], exact[row(128)..row(512)]);
        assert_eq!(coded[row(512)..], exact[row(512)..]);
        let reload = |part: &mut Part, traffic: &mut Traffic| {
            part.close().unwrap();
            part.open_with(None).unwrap();
            part.load(&spill, &|| true, traffic).unwrap();
        };
        reload(&mut part, &mut traffic);
        assert!(all(&part) == coded);
        assert!(traffic.bytes_read < 600 * 2 * ROW as u64);
        // A row of a coded group is written again: the group is raw from then on, and never coded a second time.
        write(&mut part, 200..201, 5);
        let again = all(&part);
        part.settle(&spill, &(200..201), &mut traffic).unwrap();
        assert!(all(&part) == again);
        reload(&mut part, &mut traffic);
        assert!(all(&part) == again);
        assert_eq!(traffic.raw_bytes, 3 * 128 * 2 * ROW as u64);
    }

    #[test]
    fn rows_that_are_no_heads_are_refused() {
        let codec = Some(("tq:4".parse().unwrap(), 3));
        let error = Part::new(256, 256, 0, codec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
