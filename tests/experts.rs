//! Experts that are fetched one by one, against real files: every byte right, no lease lost, every mistake an error.

mod common;

use flea::ErrorKind;
use flea::engine::{BudgetSpec, Model, OpenOptions};
use flea::io::{ReaderKind, ReaderOptions};
use flea::mem::Backing;
use flea::plan::{ExpertOptions, experts};
use flea::units::MIB;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// 6 layers of 16 experts, two sizes of them (the down projections of half the layers are larger), none on a page's edge.
fn mixture() -> PathBuf {
    let arguments = "--arch qwen3moe --layers 6 --embd 256 --ffn 512 --heads 4 --kv-heads 2 --vocab 800 --type q4_k_m --seed 7 \
                     --experts 16 --experts-used 4";
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    common::synth("experts", &arguments)
}

fn smallest(path: &Path) -> u64 {
    let (catalog, _) = flea::engine::read_catalog(path).expect("a model");
    experts::smallest_budget_bytes(&catalog, &ExpertOptions::default()).expect("experts")
}

fn open(path: &Path, pool_bytes: u64, kind: ReaderKind) -> Model {
    let options = OpenOptions {
        budget: BudgetSpec::Pool(pool_bytes),
        experts: true,
        reader: ReaderOptions {
            kind,
            ..ReaderOptions::default()
        },
        ..OpenOptions::default()
    };
    Model::open(path, options).expect("a model")
}

/// The ranges of one expert of a layer in all stacks of it.
fn ranges_of(model: &Model, layer: u32, expert: u32) -> Vec<(usize, usize)> {
    let catalog = model.catalog();
    let uses = &catalog.layers[layer as usize].uses;
    let stacks = uses.iter().filter_map(|part| {
        let tensor = &catalog.tensors[part.tensor_index as usize];
        tensor.expert_extent(expert)
    });
    stacks
        .map(|extent| {
            let address = model.address(extent.shard_index, extent.offset_bytes);
            (address as usize, extent.len_bytes as usize)
        })
        .collect()
}

/// [`mixture`] in files of 2 MiB.
fn split_mixture(directory: &Path) -> PathBuf {
    let arguments = "synth --arch qwen3moe --layers 6 --embd 256 --ffn 512 --heads 4 --kv-heads 2 --vocab 800 --type q4_k_m \
                     --seed 7 --experts 16 --experts-used 4 --split-bytes 2MiB --json -o";
    let mut command = common::flea();
    command
        .args(arguments.split_whitespace())
        .arg(directory.join("m.gguf"));
    let report = common::json(&mut command);
    PathBuf::from(report["files"][0].as_str().expect("a file"))
}

fn check_bytes(model: &Model, file: &std::fs::File, range: (usize, usize)) {
    check_bytes_from(model.address(0, 0) as usize, file, range);
}

/// `base`: where the window of the file begins.
#[allow(unsafe_code)]
fn check_bytes_from(base: usize, file: &std::fs::File, range: (usize, usize)) {
    let mut expected = vec![0u8; range.1];
    file.read_exact_at(&mut expected, (range.0 - base) as u64)
        .expect("read");
    // SAFETY: the caller holds a lease of the range.
    let there = unsafe { std::slice::from_raw_parts(range.0 as *const u8, range.1) };
    assert!(there == expected, "{range:x?} differs from the file");
}

#[test]
fn every_expert_is_right_at_every_budget_and_the_counters_add_up() {
    let path = mixture();
    let file = std::fs::File::open(&path).expect("open");
    let model_bytes = file.metadata().expect("metadata").len();
    let least = smallest(&path);
    for (pool_bytes, kind) in [
        (least, ReaderKind::IoUring),
        (least + model_bytes / 4, ReaderKind::Pread),
        (least + model_bytes / 2, ReaderKind::IoUring),
    ] {
        let model = open(&path, pool_bytes, kind);
        let plan = model.plan().expect("a plan");
        let cache = plan.experts.as_ref().expect("experts");
        assert!(plan.resident_bytes + cache.cache_bytes <= pool_bytes);
        // A walk that never repeats a choice soon: 4 of 16, by a rule that every run follows.
        let mut asked = 0;
        for step in 0..40u32 {
            for layer in 0..6u32 {
                let mut chosen: Vec<u32> = (0..4)
                    .map(|slot| (step * 5 + layer * 3 + slot * 7) % 16)
                    .collect();
                chosen.sort_unstable();
                chosen.dedup();
                let ranges: Vec<_> = chosen
                    .iter()
                    .flat_map(|expert| ranges_of(&model, layer, *expert))
                    .collect();
                assert_eq!(ranges.len(), 3 * chosen.len());
                model.acquire_ranges(&ranges, None).expect("acquire");
                for range in &ranges {
                    check_bytes(&model, &file, *range);
                }
                model.release_ranges(&ranges).expect("release");
                asked += ranges.len() as u64;
            }
        }
        let stats = model.stats();
        assert_eq!(stats.experts.hits + stats.experts.misses, asked);
        assert_eq!(stats.experts.calls, 240);
        assert!(stats.experts.misses > 0 && stats.experts.misses < asked || pool_bytes == least);
        let pages: u64 = cache.units.iter().map(|unit| unit.run.page_count).sum();
        let each = (pages * plan.page_bytes) as f64 / cache.units.len() as f64;
        let expected = stats.experts.misses as f64 * each;
        let read = stats.experts.bytes as f64;
        assert!(
            (read / expected - 1.0).abs() < 0.25,
            "{read} read, {expected} expected"
        );
        let all = stats.bytes_read as f64;
        let known = read + plan.resident_bytes as f64;
        assert!(
            (all / known - 1.0).abs() < 0.05,
            "{all} bytes read, {known} accounted for"
        );
    }
}

#[test]
fn leases_protect_and_what_never_fits_is_refused() {
    let path = mixture();
    let file = std::fs::File::open(&path).expect("open");
    let model = open(&path, smallest(&path), ReaderKind::Auto);
    let held: Vec<_> = (0..2)
        .flat_map(|expert| ranges_of(&model, 0, expert))
        .collect();
    model.acquire_ranges(&held, None).expect("acquire");
    // Everything else goes through the rest of the cache.
    for layer in 1..6 {
        for expert in 0..16 {
            let ranges = ranges_of(&model, layer, expert);
            model.acquire_ranges(&ranges, None).expect("acquire");
            model.release_ranges(&ranges).expect("release");
        }
    }
    for range in &held {
        check_bytes(&model, &file, *range);
    }
    let all: Vec<_> = (0..16)
        .flat_map(|expert| ranges_of(&model, 1, expert))
        .collect();
    let error = model.acquire_ranges(&all, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    // As many as there are slots, but this thread holds some of them.
    let four: Vec<_> = (4..8)
        .flat_map(|expert| ranges_of(&model, 0, expert))
        .collect();
    let error = model.acquire_ranges(&four, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    // Another thread may wait for them, and gets them.
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            model.acquire_ranges(&four, Some(Duration::from_secs(20)))?;
            model.release_ranges(&four)
        });
        std::thread::sleep(Duration::from_millis(50));
        model.release_ranges(&held).expect("release");
        waiting.join().expect("the thread").expect("acquire");
    });
    let error = model.release_ranges(&held).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

#[test]
fn a_try_begins_the_reads() {
    let path = mixture();
    let model = open(&path, smallest(&path), ReaderKind::Auto);
    let ranges = ranges_of(&model, 2, 3);
    model.acquire(2, None, None).expect("what every token uses");
    model.release(2).expect("release");
    let error = model
        .acquire_ranges(&ranges, Some(Duration::ZERO))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Again, "{error}");
    model.acquire_ranges(&ranges, None).expect("acquire");
    assert_eq!(model.stats().experts.misses, 3);
    model.release_ranges(&ranges).expect("release");
}

/// Everything that is hinted at is there without a miss, where it fits; where it does not, and where the hint is wrong, every
/// byte is right all the same.
#[test]
fn what_is_hinted_at_is_read_ahead_and_right() {
    let path = mixture();
    let file = std::fs::File::open(&path).expect("open");
    let model_bytes = file.metadata().expect("metadata").len();
    let least = smallest(&path);
    for (pool_bytes, fits) in [(least + model_bytes / 2, true), (least, false)] {
        let model = open(&path, pool_bytes, ReaderKind::Auto);
        let of_layer = |layer: u32| -> Vec<(usize, usize)> {
            (0..16)
                .flat_map(|expert| ranges_of(&model, layer, expert))
                .collect()
        };
        for pass in 0..3 {
            model.hint_ranges(&of_layer(0)).expect("hint");
            for layer in 0..6 {
                let now = of_layer(layer);
                let mut next = now.clone();
                // In the last pass the hint is wrong: the layer that was there before.
                next.extend(of_layer(if pass == 2 {
                    (layer + 5) % 6
                } else {
                    (layer + 1) % 6
                }));
                model.hint_ranges(&next).expect("hint");
                let some = if fits { now.len() } else { 6 };
                for part in now.chunks(some) {
                    model.acquire_ranges(part, None).expect("acquire");
                    for range in part {
                        check_bytes(&model, &file, *range);
                    }
                    model.release_ranges(part).expect("release");
                }
            }
        }
        model.hint_ranges(&[]).expect("forget");
        let counts = model.stats().experts;
        assert_eq!(counts.hits + counts.misses, 3 * 6 * 48);
        assert!(counts.ahead > 0 && counts.ahead_bytes > 0, "{counts:?}");
        if fits {
            assert!(counts.ahead + counts.misses <= 3 * 6 * 48, "{counts:?}");
        }
        let (all, known) = {
            let stats = model.stats();
            let experts = stats.experts.bytes + stats.experts.ahead_bytes;
            (
                stats.bytes_read as f64,
                (experts + stats.resident_bytes) as f64,
            )
        };
        assert!(
            (all / known - 1.0).abs() < 0.05,
            "{all} bytes read, {known} accounted for"
        );
    }
}

#[test]
fn mistakes_are_errors() {
    let path = mixture();
    let model = open(&path, smallest(&path), ReaderKind::Auto);
    let good = ranges_of(&model, 0, 0)[0];
    let (_, embedding) = model.catalog().tensor("token_embd.weight").expect("there");
    let kept = model.address(0, embedding.extent.offset_bytes) as usize;
    let header = model.address(0, 0) as usize;
    for (what, ranges) in [
        ("none", vec![]),
        ("too many", vec![good; 70_000]),
        ("empty", vec![(good.0, 0)]),
        ("nowhere", vec![(16, 16)]),
        ("the host's", vec![(kept, 16)]),
        ("the header", vec![(header, 16)]),
        ("wraps", vec![(good.0, usize::MAX)]),
        ("past the end", vec![good, (good.0, 1 << 40)]),
    ] {
        let error = model.acquire_ranges(&ranges, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{what}: {error}");
        let hinted = model.hint_ranges(&ranges);
        assert_eq!(hinted.is_ok(), what == "none", "{what}: {hinted:?}");
    }
    let error = model.acquire(0, Some(good), None).unwrap_err();
    assert!(error.to_string().contains("flea_acquire_ranges"), "{error}");
    let error = model.release_ranges(&[good]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let options = OpenOptions {
        budget: BudgetSpec::Pool(smallest(&path) - 1),
        experts: true,
        ..OpenOptions::default()
    };
    let error = Model::open(&path, options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("used by every token"), "{error}");
}

/// Where layers are streamed with all they have, ranges are leases of their layers.
#[test]
fn without_a_cache_ranges_are_leases_of_layers() {
    let path = mixture();
    let file = std::fs::File::open(&path).expect("open");
    for backing in [Backing::Private, Backing::Shared] {
        let options = OpenOptions {
            budget: BudgetSpec::Pool(16 * MIB),
            backing,
            experts: backing == Backing::Shared,
            ..OpenOptions::default()
        };
        let model = Model::open(&path, options).expect("a model");
        assert!(model.plan().expect("a plan").experts.is_none() && !model.experts_on_demand());
        for layer in 0..6 {
            let ranges: Vec<_> = (0..16)
                .flat_map(|expert| ranges_of(&model, layer, expert))
                .collect();
            model.acquire_ranges(&ranges, None).expect("acquire");
            for range in &ranges {
                check_bytes(&model, &file, *range);
            }
            model.release_ranges(&ranges).expect("release");
        }
        let stats = model.stats();
        assert!(stats.loads > 0 && stats.acquires == stats.releases);
        assert_eq!(stats.experts.calls, 0);
    }
}

/// The stacks of one layer in different files: each expert comes from its own.
#[test]
fn stacks_in_several_shards_are_read_from_their_own() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let first = split_mixture(directory.path());
    let model = open(&first, smallest(&first), ReaderKind::Auto);
    let catalog = model.catalog();
    assert!(catalog.shards.len() > 3, "{} shards", catalog.shards.len());
    let shards_of = |layer: &flea::model::Layer| {
        let stacks = layer.uses.iter().filter(|part| {
            let tensor = &catalog.tensors[part.tensor_index as usize];
            tensor.experts.is_some()
        });
        let mut shards: Vec<u32> = stacks.map(|part| part.extent.shard_index).collect();
        shards.dedup();
        shards.len()
    };
    assert!(
        catalog.layers.iter().any(|layer| shards_of(layer) > 1),
        "no layer is spread"
    );
    for layer in 0..6 {
        for expert in 0..16 {
            let ranges = ranges_of(&model, layer, expert);
            model.acquire_ranges(&ranges, None).expect("acquire");
            for shard in 0..catalog.shards.len() as u32 {
                let base = model.address(shard, 0) as usize;
                let end = base + catalog.shards[shard as usize].len_bytes as usize;
                let file = std::fs::File::open(&catalog.shards[shard as usize].path).expect("open");
                let here = ranges.iter().filter(|range| (base..end).contains(&range.0));
                for range in here {
                    check_bytes_from(base, &file, *range);
                }
            }
            model.release_ranges(&ranges).expect("release");
        }
    }
    assert!(model.stats().experts.misses > 0);
}

/// A stack that goes on where its file ends, as if the rest lay in the next one: a tensor lies in one file.
#[test]
fn a_stack_cut_by_the_end_of_its_shard_is_named() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let first = split_mixture(directory.path());
    let (catalog, files) = flea::engine::read_catalog(&first).expect("a model");
    let last = |tensor: &&flea::model::Tensor| {
        let shard = tensor.extent.shard_index as usize;
        tensor.experts.is_some() && tensor.extent.end_bytes() + 64 > files[shard].len_bytes()
    };
    let stack = catalog
        .tensors
        .iter()
        .find(last)
        .expect("a stack at the end of a shard");
    let path = &catalog.shards[stack.extent.shard_index as usize].path;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("open");
    file.set_len(stack.extent.end_bytes() - 4096).expect("cut");
    let error = flea::engine::read_catalog(&first).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Truncated, "{error}");
    let said = error.to_string();
    let name = path.file_name().expect("a name").to_string_lossy();
    assert!(
        said.contains(&stack.name) && said.contains(&*name),
        "{said}"
    );
    assert!(said.contains("reaches beyond the file's"), "{said}");
}

/// What is refused names a total that works, and no way out that does not: where whole layers need less than experts one by
/// one, they are what is planned.
#[test]
fn a_refused_budget_names_the_smallest_total_that_works() {
    let small_head = mixture();
    // What every token uses, a large head, is more than a ring of whole layers.
    let arguments = "--arch mixtral --layers 6 --embd 256 --ffn 256 --heads 4 --kv-heads 2 --vocab 20000 --type q8_0 \
                     --seed 7 --experts 4 --experts-used 3";
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    let large_head = common::synth("large-head", &arguments);
    for (model, by_experts) in [(&small_head, true), (&large_head, false)] {
        let plan = |memory: &str, extra: &[&str]| {
            let mut command = common::flea();
            command.arg("plan").arg(model).args(["--memory", memory]);
            command
                .args(["--host-bytes", "64MiB", "--json"])
                .args(extra);
            command
        };
        let roomy = common::json(&mut plan("1GiB", &[]));
        let total = common::number(&roomy, "smallest_total_bytes") as u64;
        let works = common::json(&mut plan(&total.to_string(), &[]));
        assert_eq!(works["experts"].is_object(), by_experts, "{works}");
        let refused = common::output(&mut plan(&(total - 1).to_string(), &[]));
        assert_eq!(refused.status.code(), Some(4));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains(&format!("{total} bytes")), "{said}");
        // Whole layers would not fit either, or they were tried already.
        assert!(!said.contains("--whole-experts"), "{said}");
        let whole = common::output(&mut plan(&(total - 1).to_string(), &["--whole-experts"]));
        assert_eq!(whole.status.code(), Some(4), "{total} is not the smallest");
    }
}
