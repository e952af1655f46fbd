//! The room against the fake libcuda: order, poison, pinning, and a window whose bytes are exactly where the plan has them.
#![allow(unsafe_code)]

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::memory::granularity_bytes;
use super::testing::fake_gpu;
use super::*;
use crate::error::ErrorKind;
use crate::mem::Place;
use crate::model::{Catalog, DType};
use crate::plan::image::{Image, Piece};
use crate::plan::testing::{TINY, any_case, with_tensors};
use crate::plan::tiers::VRAM_PAGE_BYTES;
use crate::plan::{PageRun, Plan, PlanOptions, plan, smallest_budget_bytes};
use crate::units::{MIB, PAGE_2M, PAGE_4K};

/// What new memory of the fake GPU holds, and what a copy shows until it is done.
const POISON: u8 = 0xA5;
const KINDS: [(DType, u64); 4] = [
    (DType::Q4_0, 96),
    (DType::F32, 7),
    (DType::Q6_K, 768),
    (DType::Q8_0, 512),
];

fn read(stream: &Stream, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: a vector of that length; copies into pageable memory are done when the call returns.
    unsafe { stream.copy_out(bytes.as_mut_ptr(), at, len).unwrap() };
    bytes
}

#[test]
fn the_gpu_is_described_and_others_do_not_exist() {
    let context = fake_gpu();
    let gpus = context::gpus().unwrap();
    assert_eq!(gpus.len(), 1);
    assert_eq!(gpus[0].name, "Fake GPU 0");
    assert!(gpus[0].maps_memory && gpus[0].free_bytes <= gpus[0].total_bytes);
    assert_eq!(
        (gpus[0].driver.as_str(), gpus[0].capability),
        ("13.0", (8, 9))
    );
    assert_eq!(granularity_bytes(&context).unwrap(), PAGE_2M);
    let error = Context::new(7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.context().contains("GPU 7"), "{error}");
}

#[test]
fn what_an_event_does_not_order_is_seen_as_poison() {
    let context = fake_gpu();
    let (one, two) = (
        Stream::new(&context).unwrap(),
        Stream::new(&context).unwrap(),
    );
    let vram = memory::Vram::new(&context, PAGE_2M).unwrap();
    let mut range = memory::AddressRange::reserve(&context, PAGE_2M).unwrap();
    range
        .map(0, &vram, PAGE_2M, memory::Access::ReadWrite)
        .unwrap();
    assert!(
        read(&one, range.base(), 4096)
            .iter()
            .all(|byte| *byte == POISON)
    );
    let source = vec![7; 4096];
    // SAFETY: pageable memory is read before the call returns.
    unsafe { one.copy_in(range.base(), source.as_ptr(), 4096).unwrap() };
    let done = one.record().unwrap();
    two.wait(&done).unwrap();
    assert_eq!(read(&two, range.base(), 4096), source);
    assert!(done.is_done().unwrap());
    done.wait().unwrap();
    // Two streams of many copies and nothing between them: sooner or later the reader comes first.
    let mut early = 0;
    for round in 0..40u8 {
        let source = vec![round; 4096];
        // SAFETY: as above.
        unsafe { one.copy_in(range.base(), source.as_ptr(), 4096).unwrap() };
        early += usize::from(read(&two, range.base(), 4096) != source);
        one.record().unwrap().wait().unwrap();
    }
    assert!(early > 0, "the fake GPU never let a reader come too early");
    one.zero(range.base() + 8, 16).unwrap();
    one.copy_within(range.base() + 4096, range.base(), 64)
        .unwrap();
    let bytes = read(&one, range.base() + 4096, 64);
    assert!(bytes[..8].iter().all(|byte| *byte == 39));
    assert!(bytes[8..24].iter().all(|byte| *byte == 0));
    assert!(bytes[24..].iter().all(|byte| *byte == 39));
}

#[test]
fn what_is_not_mapped_is_an_error_and_no_crash() {
    let context = fake_gpu();
    let vram = memory::Vram::new(&context, PAGE_2M).unwrap();
    let mut range = memory::AddressRange::reserve(&context, 2 * PAGE_2M).unwrap();
    for (offset, len) in [(PAGE_2M, 2 * PAGE_2M), (u64::MAX, 2), (0, 2 * PAGE_2M)] {
        let error = range
            .map(offset, &vram, len, memory::Access::Read)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    let error = memory::Vram::new(&context, PAGE_4K).unwrap_err();
    assert!(
        error.context().contains("CUDA_ERROR_INVALID_VALUE"),
        "{error}"
    );
    let error = memory::Vram::new(&context, 1 << 40).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoMemory);
}

#[test]
fn steps_are_pinned_while_copies_run_and_no_copy_crosses_one() {
    let context = fake_gpu();
    let mut memory = Place::reserve(8 * MIB).unwrap();
    memory.open().unwrap();
    memory.populate(8 * MIB as usize).unwrap();
    let (base, len, step) = (memory.address(), 7 * MIB as usize + 4096, MIB as usize);
    // SAFETY: the memory outlives what pins it.
    let pinned = unsafe { Pinned::new(&context, base, len, step) };
    assert_eq!(pinned.pinned_bytes(), 0);
    assert_eq!(pinned.cut(base + step - 10, 100), 10);
    assert_eq!(pinned.cut(base + step, 100), 100);
    assert_eq!(pinned.cut(base + 5, 9 * step), step - 5);
    std::thread::scope(|scope| {
        scope.spawn(|| pinned.pin_all());
        let stream = Stream::new(&context).unwrap();
        let vram = memory::Vram::new(&context, 8 * MIB).unwrap();
        let mut range = memory::AddressRange::reserve(&context, 8 * MIB).unwrap();
        range
            .map(0, &vram, 8 * MIB, memory::Access::ReadWrite)
            .unwrap();
        for round in 0..50 {
            let at = base + round * 131_072;
            let cut = pinned.cut(at, 200_000);
            let target = range.base() + (at - base) as u64;
            // SAFETY: memory of this test, which stays and does not change.
            pinned
                .with_step(at, |_| unsafe {
                    stream.copy_in(target, at as *const u8, cut)
                })
                .unwrap();
        }
        stream.record().unwrap().wait().unwrap();
    });
    assert_eq!(pinned.pinned_bytes(), len as u64);
    assert!(pinned.failure().is_none());
    assert!(pinned.with_step(base + len - 1, Ok).unwrap());
    // The same memory again is what a driver refuses.
    // SAFETY: the memory outlives what pins it.
    let again = unsafe { Pinned::new(&context, base, len, step) };
    again.pin_all();
    let failure = again.failure().unwrap();
    assert!(
        failure.context().contains("ALREADY_REGISTERED"),
        "{failure}"
    );
    assert!(failure.context().contains("ulimit -l"), "{failure}");
    drop(again);
    drop(pinned);
    // SAFETY: the memory outlives what pins it.
    let third = unsafe { Pinned::new(&context, base, len, step) };
    third.pin_all();
    assert_eq!(third.pinned_bytes(), len as u64);
}

/// Every byte of a file says where it stands.
fn byte_of(shard: u32, offset: u64) -> u8 {
    (offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 ^ (shard as u8) << 3
}

/// Writes what lies in a run, as a stage does.
fn fill(pool: &VramPool, stream: &Stream, pieces: &[Piece]) {
    for piece in pieces {
        let bytes: Vec<u8> = (0..piece.file.len_bytes)
            .map(|skip| byte_of(piece.file.shard_index, piece.file.offset_bytes + skip))
            .collect();
        let at = pool.base() + piece.offset_bytes;
        if !bytes.is_empty() {
            // SAFETY: pageable memory is read before the call returns.
            unsafe { stream.copy_in(at, bytes.as_ptr(), bytes.len()).unwrap() };
        }
        if piece.padding_bytes > 0 {
            let len = piece.padding_bytes as usize;
            stream.zero(at + piece.file.len_bytes, len).unwrap();
        }
    }
}

/// The bytes of a run as they should be, over what was there.
fn expected(run: &PageRun, pieces: &[Piece], mut bytes: Vec<u8>) -> Vec<u8> {
    let start = run.first_page * VRAM_PAGE_BYTES;
    for piece in pieces {
        let at = (piece.offset_bytes - start) as usize;
        let len = piece.file.len_bytes as usize;
        for skip in 0..len {
            bytes[at + skip] = byte_of(
                piece.file.shard_index,
                piece.file.offset_bytes + skip as u64,
            );
        }
        bytes[at + len..at + len + piece.padding_bytes as usize].fill(0);
    }
    bytes
}

fn run_bytes(pool: &VramPool, stream: &Stream, run: &PageRun) -> Vec<u8> {
    let at = pool.base() + run.first_page * VRAM_PAGE_BYTES;
    read(stream, at, (run.page_count * VRAM_PAGE_BYTES) as usize)
}

fn check_window(catalog: &Catalog, part: u64) -> TestCaseResult {
    let context = fake_gpu();
    let image = Image::new(catalog, VRAM_PAGE_BYTES).unwrap();
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: VRAM_PAGE_BYTES,
    };
    let smallest = smallest_budget_bytes(&image.catalog, &options).unwrap();
    let whole = plan(&image.catalog, 1 << 60, &options)
        .unwrap()
        .resident_bytes;
    let budget = smallest + whole.saturating_sub(smallest) / 1000 * part;
    let plan = plan(&image.catalog, budget, &options).unwrap();
    let pool = VramPool::new(&context, image.len_bytes, &plan).unwrap();
    prop_assert!(pool.held_bytes() <= budget);
    let stream = Stream::new(&context).unwrap();
    let resident = fill_resident(&image, &plan, &pool, &stream);
    for _pass in 0..2 {
        for (layer, planned) in plan.layers.iter().enumerate() {
            let Some(run) = &planned.transient else {
                continue;
            };
            let before = run_bytes(&pool, &stream, run);
            let pieces = image.pieces_in(layer, run, VRAM_PAGE_BYTES);
            fill(&pool, &stream, &pieces);
            let after = run_bytes(&pool, &stream, run);
            prop_assert!(after == expected(run, &pieces, before), "layer {layer}");
            // Every layer of the slot sees the same bytes at its own place.
            let twins = plan
                .layers
                .iter()
                .filter(|other| other.slot_index == planned.slot_index);
            for twin in twins.filter_map(|other| other.transient) {
                let seen = run_bytes(&pool, &stream, &twin);
                let len = seen.len().min(after.len());
                prop_assert!(seen[..len] == after[..len]);
            }
        }
    }
    for (run, bytes) in resident {
        prop_assert!(
            run_bytes(&pool, &stream, &run) == bytes,
            "a neighbour was written over"
        );
    }
    Ok(())
}

/// Fills the resident runs and gives what they hold then: between tensors the poison of new memory, which is the canary.
fn fill_resident(
    image: &Image,
    plan: &Plan,
    pool: &VramPool,
    stream: &Stream,
) -> Vec<(PageRun, Vec<u8>)> {
    let mut kept = Vec::new();
    for run in &plan.resident {
        let mut bytes = vec![POISON; (run.page_count * VRAM_PAGE_BYTES) as usize];
        for layer in 0..image.pieces.len() {
            let pieces = image.pieces_in(layer, run, VRAM_PAGE_BYTES);
            fill(pool, stream, &pieces);
            bytes = expected(run, &pieces, bytes);
        }
        assert!(run_bytes(pool, stream, run) == bytes);
        kept.push((*run, bytes));
    }
    kept
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn bytes_are_exactly_in_their_places_and_neighbours_stay(case in any_case(TINY), part in 0..=1000u64) {
        check_window(&with_tensors(case.0, &KINDS), part)?;
    }
}

#[test]
fn more_than_is_free_is_refused_with_the_arithmetic() {
    let context = fake_gpu();
    let catalog = crate::plan::testing::even_catalog(4, &[(0, 200 * MIB)]);
    let image = Image::new(&catalog, VRAM_PAGE_BYTES).unwrap();
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: VRAM_PAGE_BYTES,
    };
    let plan = plan(&image.catalog, 800 * MIB, &options).unwrap();
    let error = VramPool::new(&context, image.len_bytes, &plan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    for part in ["800.0 MiB", "Fake GPU 0", "nvidia-smi"] {
        assert!(error.context().contains(part), "{error}");
    }
}

#[test]
fn another_view_of_exported_memory_sees_the_same_bytes() {
    let context = fake_gpu();
    let catalog = with_tensors(
        crate::plan::testing::even_catalog(6, &[(0, 3 * MIB), (1, MIB)]),
        &KINDS,
    );
    let image = Image::new(&catalog, VRAM_PAGE_BYTES).unwrap();
    let options = PlanOptions {
        slots_count: 3,
        page_bytes: VRAM_PAGE_BYTES,
    };
    let budget = smallest_budget_bytes(&image.catalog, &options).unwrap() + 2 * PAGE_2M;
    let plan = plan(&image.catalog, budget, &options).unwrap();
    let pool = VramPool::new(&context, image.len_bytes, &plan).unwrap();
    let stream = Stream::new(&context).unwrap();
    let parts = pool.export().unwrap();
    let view = VramView::import(&context, image.len_bytes, &parts).unwrap();
    drop(parts);
    let run = plan.layers[2].transient.unwrap();
    fill(&pool, &stream, &image.pieces_in(2, &run, VRAM_PAGE_BYTES));
    let offset = run.first_page * VRAM_PAGE_BYTES;
    let len = (run.page_count * VRAM_PAGE_BYTES) as usize;
    let seen = read(&stream, view.base() + offset, len);
    assert!(seen == run_bytes(&pool, &stream, &run));
    assert_ne!(view.base(), pool.base());
}
