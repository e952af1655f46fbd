//! Tests of mirrors: what is no copy is refused, both copies serve, a copy that fails is dropped and no byte is wrong.

use std::os::unix::fs::FileExt;

use super::*;
use crate::io::AlignedMemory;
use crate::units::{MIB, PAGE_4K};

const LEN_BYTES: u64 = 24 * MIB + 777;
const REQUEST_BYTES: u64 = 256 << 10;

/// A directory each for the model and its copies, all with the same file.
fn copies(count: usize) -> (tempfile::TempDir, Vec<PathBuf>) {
    let root = tempfile::tempdir().unwrap();
    let mut state = 7u64;
    let bytes: Vec<u8> = (0..LEN_BYTES)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let directories = (0..count).map(|copy| {
        let directory = root.path().join(format!("copy{copy}"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("m.gguf"), &bytes).unwrap();
        directory
    });
    let directories = directories.collect();
    (root, directories)
}

fn opened(directories: &[PathBuf]) -> Result<Vec<ShardFile>> {
    let first = ShardFile::open(&directories[0].join("m.gguf"))?;
    open(vec![first], &directories[1..])
}

fn mirrored(files: Vec<ShardFile>, kind: ReaderKind) -> (Mirrored, Arc<Copies>) {
    let copies = Arc::new(Copies::new(&files, 1));
    let options = ReaderOptions {
        kind,
        request_bytes: REQUEST_BYTES as u32,
        depth: 4,
        retries: 0,
        ..ReaderOptions::default()
    };
    let reader = Mirrored::new(files.into(), Arc::clone(&copies), &options).unwrap();
    (reader, copies)
}

/// Asks for one piece of the file, into the same place of the memory, which has to outlive its completion.
fn submit(reader: &mut Mirrored, memory: &AlignedMemory, piece: u64) -> Result<()> {
    let request = Request {
        key: piece,
        shard_index: 0,
        offset_bytes: piece * REQUEST_BYTES,
        len_bytes: REQUEST_BYTES,
        // SAFETY: below the length, rounded up to whole requests.
        target: unsafe { memory.as_ptr().add((piece * REQUEST_BYTES) as usize) },
    };
    // SAFETY: every piece has a place of its own, and callers wait for all of them before the memory goes.
    unsafe { reader.submit(request) }
}

/// Reads the whole file through the reader.
fn read_all(reader: &mut Mirrored, between: &mut dyn FnMut(u64)) -> Result<Vec<u8>> {
    let memory = AlignedMemory::new(LEN_BYTES.next_multiple_of(REQUEST_BYTES), PAGE_4K)?;
    let count = LEN_BYTES.div_ceil(REQUEST_BYTES);
    let (mut next, mut done) = (0, 0);
    let mut out = Vec::new();
    let mut failure = Ok(());
    while done < next || (next < count && failure.is_ok()) {
        while next < count && reader.free() > 0 && failure.is_ok() {
            submit(reader, &memory, next)?;
            next += 1;
        }
        reader.wait(None, &mut out)?;
        for completion in out.drain(..) {
            done += 1;
            between(done);
            if completion.result.is_err() {
                failure = completion.result;
            }
        }
    }
    failure.map(|()| memory.bytes()[..LEN_BYTES as usize].to_vec())
}

#[test]
fn both_copies_serve_and_every_byte_is_right() {
    for kind in [ReaderKind::Auto, ReaderKind::Pread] {
        let (_root, directories) = copies(2);
        let expected = std::fs::read(directories[0].join("m.gguf")).unwrap();
        let (mut reader, copies) = mirrored(opened(&directories).unwrap(), kind);
        for _ in 0..3 {
            assert!(read_all(&mut reader, &mut |_| {}).unwrap() == expected);
        }
        let stats = copies.stats();
        assert!(
            stats
                .iter()
                .all(|copy| copy.bytes_read > 0 && !copy.is_dropped),
            "{stats:?}"
        );
        let sum: u64 = stats.iter().map(|copy| copy.bytes_read).sum();
        assert_eq!(sum, 3 * LEN_BYTES);
        assert_eq!(reader.counters().bytes, 3 * LEN_BYTES);
        assert!(reader.drain(Duration::from_secs(5)).is_empty());
    }
}

#[test]
fn a_copy_that_fails_is_dropped_and_the_others_go_on() {
    let (_root, directories) = copies(3);
    let expected = std::fs::read(directories[0].join("m.gguf")).unwrap();
    for broken in [0, 2] {
        std::fs::write(directories[broken].join("m.gguf"), &expected).unwrap();
        let (mut reader, copies) = mirrored(opened(&directories).unwrap(), ReaderKind::Auto);
        // Cut while it is in use: its reads end early. Bytes of it that are here by then were right.
        let cut = directories[broken].join("m.gguf");
        let bytes = read_all(&mut reader, &mut |done| {
            if done == 4 {
                let file = std::fs::OpenOptions::new().write(true).open(&cut).unwrap();
                file.set_len(PAGE_4K).unwrap();
            }
        });
        assert!(bytes.unwrap() == expected);
        let said = reader.check_unchanged(0).map_err(|error| error.kind());
        match broken {
            0 => assert_eq!(said, Err(ErrorKind::Truncated), "the model itself"),
            _ => assert_eq!(said, Ok(()), "what is dropped is looked at no more"),
        }
        let stats = copies.stats();
        assert!(stats[broken].is_dropped, "{stats:?}");
        assert_eq!(stats.iter().filter(|copy| copy.is_dropped).count(), 1);
        std::fs::write(&cut, &expected).unwrap();
    }
}

#[test]
fn with_no_copy_left_the_failure_is_told() {
    let (_root, directories) = copies(2);
    let (mut reader, copies) = mirrored(opened(&directories).unwrap(), ReaderKind::Auto);
    for directory in &directories {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(directory.join("m.gguf"))
            .unwrap();
        file.set_len(PAGE_4K).unwrap();
    }
    assert!(read_all(&mut reader, &mut |_| {}).is_err());
    assert!(copies.stats().iter().any(|copy| copy.is_dropped));
}

#[test]
fn a_copy_that_changes_is_dropped_and_the_model_itself_is_an_error() {
    let (_root, directories) = copies(3);
    let (mut reader, copies) = mirrored(opened(&directories).unwrap(), ReaderKind::Auto);
    assert!(reader.check_unchanged(0).is_ok());
    std::fs::write(directories[1].join("m.gguf"), b"other").unwrap();
    assert!(reader.check_unchanged(0).is_ok(), "the others go on");
    assert!(copies.stats()[1].is_dropped);
    rewrite(&directories[0].join("m.gguf"), Writer::InPlace);
    for _ in 0..2 {
        let error = reader.check_unchanged(0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Changed, "{error}");
    }
    let dropped = copies.stats().into_iter().map(|copy| copy.is_dropped);
    assert_eq!(dropped.collect::<Vec<_>>(), [true, true, false]);
    // The last one has nobody to go on.
    std::fs::write(directories[2].join("m.gguf"), b"other").unwrap();
    assert!(reader.check_unchanged(0).is_err());
}

/// How a newer model takes the place of a copy.
#[derive(Debug, Clone, Copy)]
enum Writer {
    /// `rsync --inplace`.
    InPlace,
    /// `cp`: cut to nothing, then written.
    Truncating,
}

/// Other bytes, as many of them, under the same inode.
fn rewrite(path: &Path, writer: Writer) {
    let other: Vec<u8> = std::fs::read(path).unwrap().iter().map(|b| !b).collect();
    let mut options = std::fs::OpenOptions::new();
    options
        .write(true)
        .truncate(matches!(writer, Writer::Truncating));
    let mut file = options.open(path).unwrap();
    std::io::Write::write_all(&mut file, &other).unwrap();
    // A coarse clock may give two writes the same time.
    let later = std::time::SystemTime::now() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
}

#[test]
fn bytes_of_a_rewritten_copy_are_read_again_from_the_others() {
    for kind in [ReaderKind::Auto, ReaderKind::Pread] {
        for writer in [Writer::InPlace, Writer::Truncating] {
            let (_root, directories) = copies(2);
            let expected = std::fs::read(directories[0].join("m.gguf")).unwrap();
            let (mut reader, copies) = mirrored(opened(&directories).unwrap(), kind);
            let memory = AlignedMemory::new(LEN_BYTES, PAGE_4K).unwrap();
            // A fetch is under way on both copies; the ring reads for it in `wait`, after the copy was rewritten.
            reader.check_unchanged(0).unwrap();
            let mut pieces = 0;
            while reader.free() > 0 {
                submit(&mut reader, &memory, pieces).unwrap();
                pieces += 1;
            }
            let sent = &reader.spread.as_ref().unwrap().sent;
            assert!(sent.iter().any(|sent| sent.lane == 1), "{sent:?}");
            rewrite(&directories[1].join("m.gguf"), writer);
            // The next fetch begins, finds the copy changed, and does without it.
            reader.check_unchanged(0).unwrap();
            assert!(copies.stats()[1].is_dropped);
            // The first one comes to its end.
            let (mut out, mut done) = (Vec::new(), 0);
            while done < pieces {
                reader.wait(None, &mut out).unwrap();
                for completion in out.drain(..) {
                    completion.result.unwrap();
                    done += 1;
                }
            }
            reader.check_unchanged(0).unwrap();
            let len = (pieces * REQUEST_BYTES) as usize;
            let right = memory.bytes()[..len] == expected[..len];
            assert!(right, "{kind} {writer:?}: bytes of the newer file");
        }
    }
}

#[test]
fn what_is_no_copy_is_refused() {
    let (_root, directories) = copies(2);
    let copy = directories[1].join("m.gguf");
    let refusal = || opened(&directories).unwrap_err().to_string();
    let original = std::fs::read(&copy).unwrap();
    for wrong_byte in [0, 5000, LEN_BYTES as usize - 1] {
        let mut bytes = original.clone();
        bytes[wrong_byte] ^= 1;
        std::fs::write(&copy, &bytes).unwrap();
        let text = refusal();
        assert!(text.contains(&format!("at offset {wrong_byte}")), "{text}");
    }
    std::fs::write(&copy, &original[1..]).unwrap();
    assert!(refusal().contains("bytes, but"));
    std::fs::remove_file(&copy).unwrap();
    assert_eq!(
        opened(&directories).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    std::fs::hard_link(directories[0].join("m.gguf"), &copy).unwrap();
    assert!(refusal().contains("same file"));
}

/// Where at least 16 pages begin that no sample looks at, beyond the head.
fn unsampled_bytes() -> u64 {
    let pages: std::collections::BTreeSet<u64> = same::sampled_pages(LEN_BYTES).collect();
    let gap = |at: &u64| (0..16).all(|page| !pages.contains(&(at + page * PAGE_4K)));
    (2 * MIB..LEN_BYTES - MIB)
        .step_by(1 << 16)
        .find(gap)
        .unwrap()
}

#[test]
fn an_interrupted_copy_of_the_right_length_is_refused() {
    let (_root, directories) = copies(2);
    let copy = directories[1].join("m.gguf");
    let bytes = std::fs::read(&copy).unwrap();
    let gap = unsampled_bytes()..unsampled_bytes() + 16 * PAGE_4K;
    for preallocated in [false, true] {
        let file = std::fs::File::create(&copy).unwrap();
        file.set_len(LEN_BYTES).unwrap();
        let mode = nix::fcntl::FallocateFlags::empty();
        let len = i64::try_from(LEN_BYTES).unwrap();
        if preallocated && nix::fcntl::fallocate(&file, mode, 0, len).is_err() {
            continue; // Not every filesystem has it.
        }
        let (before, after) = (gap.start as usize, gap.end as usize);
        file.write_all_at(&bytes[..before], 0).unwrap();
        file.write_all_at(&bytes[after..], gap.end).unwrap();
        file.sync_all().unwrap();
        let error = opened(&directories).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let place = format!("at offset {}", gap.start);
        assert!(error.to_string().contains(&place), "{error}");
    }
}

#[test]
fn a_sparse_copy_of_a_model_with_zeros_is_a_copy() {
    let (_root, directories) = copies(2);
    let (model, copy) = (directories[0].join("m.gguf"), directories[1].join("m.gguf"));
    let mut bytes = std::fs::read(&model).unwrap();
    let zeros = 4_usize << 20..6_usize << 20;
    bytes[zeros.clone()].fill(0);
    std::fs::write(&model, &bytes).unwrap();
    // As `cp --sparse=always` makes it, of a model that has its zeros written out.
    let file = std::fs::File::create(&copy).unwrap();
    file.set_len(LEN_BYTES).unwrap();
    file.write_all_at(&bytes[..zeros.start], 0).unwrap();
    file.write_all_at(&bytes[zeros.end..], zeros.end as u64)
        .unwrap();
    assert!(opened(&directories).is_ok());
    // And the other way round; and both with a hole.
    std::fs::rename(&model, directories[0].join("whole")).unwrap();
    std::fs::rename(&copy, &model).unwrap();
    std::fs::rename(directories[0].join("whole"), &copy).unwrap();
    assert!(opened(&directories).is_ok());
}
