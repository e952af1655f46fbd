//! Packing and compressing that do not come to their end: stopped by a signal, killed, or out of room in the middle. Nothing
//! of the new file is left, and the file that it was to replace is what it was.

#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{flea, synth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What stood at the target before.
const BEFORE: &[u8] = b"what was there before";
/// Attempts to catch a program in the middle of its work.
const ATTEMPTS: usize = 20;
/// How long one is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough that writing it can be interrupted.
fn model() -> PathBuf {
    let arguments = "--arch llama --layers 10 --embd 1024 --ffn 4096 --heads 8 --kv-heads 8 --vocab 2000 --type bf16";
    synth(
        "pack-interrupted",
        &arguments.split(' ').collect::<Vec<_>>(),
    )
}

/// `flea pack`, with a file at its target that it may replace.
fn packing(target: &Path, words: &[&str]) -> Command {
    let mut command = flea();
    command.arg("pack").arg(model()).args(["--force", "-o"]);
    command.arg(target).args(words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    ignore_file_limit(&mut command);
    command
}

/// A limit on files is an error, not a signal, for who ignores the signal: as a full disk is.
#[allow(unsafe_code)]
fn ignore_file_limit(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: one system call between fork and exec, which allocates nothing.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            Ok(())
        });
    }
}

/// From now on files of that process may not grow beyond so many bytes.
#[allow(unsafe_code)]
fn limit_files(child: &Child, bytes: libc::rlim_t) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the limit is read, and nothing is written: the place for the old one is null.
    let status = unsafe {
        libc::prlimit(
            pid(child).as_raw(),
            libc::RLIMIT_FSIZE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
}

fn signal(child: &Child, signal: Signal) {
    kill(pid(child), signal).expect("a signal");
}

/// Whether a process stands still.
fn is_stopped(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    let state = stat.rsplit(") ").next().unwrap_or_default();
    state.starts_with('T')
}

/// Whether it has written a part of a file in `folder`, which has another name than `target` or none.
fn is_writing(child: &Child, target: &Path) -> bool {
    let folder = target.parent().expect("a folder");
    let open = fs::read_dir(format!("/proc/{}/fd", child.id()));
    let mut open = open.into_iter().flatten().flatten();
    open.any(|entry| {
        let shown = fs::read_link(entry.path()).unwrap_or_default();
        let written = fs::read_to_string(format!("/proc/{}/io", child.id()));
        let written = written.unwrap_or_default();
        let bytes = written
            .lines()
            .find_map(|line| line.strip_prefix("wchar: "));
        let bytes: u64 = bytes.and_then(|text| text.parse().ok()).unwrap_or(0);
        shown.starts_with(folder) && shown != target && bytes > 1 << 20
    })
}

/// Starts the work, and holds it in the middle. What `target` names has not been replaced then.
fn held_in_the_middle(target: &Path, words: &[&str]) -> Child {
    model();
    for _ in 0..ATTEMPTS {
        fs::write(target, BEFORE).expect("a file");
        let mut child = packing(target, words).spawn().expect("flea runs");
        let began = Instant::now();
        while child.try_wait().expect("a child").is_none() && began.elapsed() < PATIENCE {
            if !is_writing(&child, target) {
                std::thread::sleep(Duration::from_micros(300));
                continue;
            }
            signal(&child, Signal::SIGSTOP);
            while !is_stopped(&child) && child.try_wait().expect("a child").is_none() {
                std::thread::sleep(Duration::from_micros(300));
            }
            if is_stopped(&child) && fs::read(target).is_ok_and(|bytes| bytes == BEFORE) {
                return child;
            }
            signal(&child, Signal::SIGCONT);
        }
        let said = child.wait_with_output().expect("its end");
        println!("not caught: {}", said.status);
    }
    panic!("{ATTEMPTS} times it was done before it could be held");
}

/// Lets it go on to its end, and looks at what is there.
fn end(child: Child, target: &Path) -> Output {
    signal(&child, Signal::SIGCONT);
    let said = child.wait_with_output().expect("its end");
    assert!(!said.status.success(), "{said:?}");
    let folder = fs::read_dir(target.parent().expect("a folder")).expect("a folder");
    let names: Vec<PathBuf> = folder.map(|entry| entry.expect("a name").path()).collect();
    assert_eq!(names, [target], "{said:?}");
    assert!(fs::read(target).expect("the target") == BEFORE);
    said
}

const WAYS: [&[&str]; 2] = [&[], &["--compress"]];

#[test]
fn one_signal_stops_it_and_leaves_nothing() {
    for words in WAYS {
        for stop in [Signal::SIGINT, Signal::SIGTERM] {
            let folder = tempfile::tempdir().expect("a folder");
            let target = folder.path().join("out");
            let child = held_in_the_middle(&target, words);
            signal(&child, stop);
            let said = end(child, &target);
            let text = String::from_utf8_lossy(&said.stderr);
            assert_eq!(said.status.code(), Some(130), "{text}");
            assert!(text.contains("interrupted"), "{text}");
        }
    }
}

/// The second signal ends the program at once, in the middle of a write; SIGKILL asks nobody.
#[test]
fn dying_at_once_leaves_nothing() {
    for words in WAYS {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("out");
        let child = held_in_the_middle(&target, words);
        // Both are pending when it goes on.
        signal(&child, Signal::SIGINT);
        signal(&child, Signal::SIGTERM);
        let said = end(child, &target);
        assert_eq!(said.status.code(), Some(130), "{said:?}");

        let child = held_in_the_middle(&target, words);
        signal(&child, Signal::SIGKILL);
        let said = end(child, &target);
        assert_eq!(said.status.signal(), Some(9), "{said:?}");
        // What was killed does not stand in the way of the next one.
        let again = packing(&target, words).output().expect("flea runs");
        assert!(again.status.success(), "{again:?}");
        assert!(fs::metadata(&target).expect("the target").len() > 1 << 20);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }
}

/// Its files may not grow any more in the middle: the kernel answers its next write as it does where no room is left.
#[test]
fn a_write_that_fails_in_the_middle_leaves_nothing() {
    for words in WAYS {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("out");
        let child = held_in_the_middle(&target, words);
        limit_files(&child, 1 << 20);
        let said = end(child, &target);
        let text = String::from_utf8_lossy(&said.stderr);
        assert!(text.contains("File too large"), "{text}");
    }
}

/// A disk without room is refused before a byte is written. A small tmpfs needs a mount, and that needs root.
#[test]
fn a_disk_without_room_is_refused_and_keeps_what_it_has() {
    const NO_MOUNT: i32 = 77;
    let folder = tempfile::tempdir().expect("a folder");
    let script = r#"mount -t tmpfs -o size=8m tmpfs "$1" && printf %s "$2" >"$1/out" || exit 77
        folder=$1; shift 2; "$@"; echo "exit $?"; ls -A "$folder"; cat "$folder/out""#;
    let before = std::str::from_utf8(BEFORE).expect("text");
    for words in WAYS {
        let target = folder.path().join("out");
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", script, "bash"]);
        command.arg(folder.path()).arg(before);
        let mut packing = packing(&target, words);
        packing.arg("--json");
        command.arg(packing.get_program()).args(packing.get_args());
        let said = command.output().expect("unshare of util-linux");
        let stderr = String::from_utf8_lossy(&said.stderr);
        if said.status.code() == Some(NO_MOUNT) || stderr.starts_with("unshare:") {
            return common::skip("no mount of a small tmpfs: not root");
        }
        let text = String::from_utf8_lossy(&said.stdout);
        assert!(
            text.contains("REFUSED") && text.contains("free"),
            "{said:?}"
        );
        let expected = format!("exit 4\nout\n{before}");
        assert!(text.ends_with(&expected), "{said:?}");
    }
}
