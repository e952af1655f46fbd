//! A file before it has its name: nobody sees it, and however its writer ends, nothing of it is left.
//!
//! It is nameless (O_TMPFILE) until all of it is there, so the kernel takes it away when its writer dies, by whatever
//! signal. A filesystem without nameless files gives it a name with the process's number meanwhile; that one a killed writer
//! leaves. Invariants: two writers of one target never touch each other's bytes; a name is given to this inode or to none; a
//! target that stands is replaced only where that was asked for, and in one step.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

/// Names tried: others may have left theirs, with the number that this process has now.
const NAMES_MAX: u32 = 1000;

/// A file on its way to its name.
#[derive(Debug)]
pub struct Unpublished {
    file: File,
    path: PathBuf,
    /// What it is called meanwhile, where it has to be called something.
    name: Option<PathBuf>,
}

/// The directory that holds a file.
pub fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl Unpublished {
    /// An empty file that may become `path`, open to be written with O_DIRECT where the filesystem has it.
    ///
    /// # Errors
    /// What creating a file in that directory gives.
    pub fn create(path: &Path) -> io::Result<Self> {
        match open(directory(path), libc::O_TMPFILE, false) {
            Ok(file) if proc_name(&file).exists() => Ok(Self {
                file,
                path: path.to_owned(),
                name: None,
            }),
            // Without /proc it could not be given its name.
            Ok(_) => Self::named(path),
            Err(error) if has_no_nameless(&error) => Self::named(path),
            Err(error) => Err(error),
        }
    }

    /// The same where a file needs a name from its beginning.
    fn named(path: &Path) -> io::Result<Self> {
        let (name, file) = with_free_name(path, |name| open(name, 0, true))?;
        log::info!(
            "no nameless files in {}: written as {}, which a killed writer leaves behind",
            directory(path).display(),
            name.display()
        );
        Ok(Self {
            file,
            path: path.to_owned(),
            name: Some(name),
        })
    }

    /// What to write to.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name; `force` replaces what has it.
    ///
    /// # Errors
    /// `AlreadyExists` without `force`; what linking and renaming give. It is withdrawn when it is dropped then.
    pub fn publish(&mut self, force: bool) -> io::Result<()> {
        match self.name.clone() {
            None => self.link_to_target(force),
            Some(name) => self.rename_to_target(&name, force),
        }
    }

    fn link(&self, to: &Path) -> io::Result<()> {
        let from = proc_name(&self.file);
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(AT_FDCWD, &from, AT_FDCWD, to, follow).map_err(io::Error::from)
    }

    fn link_to_target(&mut self, force: bool) -> io::Result<()> {
        match self.link(&self.path) {
            Err(error) if force && error.kind() == io::ErrorKind::AlreadyExists => {}
            result => return result,
        }
        // A link replaces nothing: for the moment between two calls the file, which is whole, has a name of its own.
        let (name, ()) = with_free_name(&self.path, |name| self.link(name))?;
        self.name = Some(name.clone());
        self.rename_to_target(&name, true)
    }

    fn rename_to_target(&mut self, name: &Path, force: bool) -> io::Result<()> {
        if !self.is_at(name) {
            let what = format!("{} has become another file", name.display());
            return Err(io::Error::other(what));
        }
        if force {
            fs::rename(name, &self.path)?;
            self.name = None;
            return Ok(());
        }
        match fs::hard_link(name, &self.path) {
            // Dropping takes the other name away.
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
            // No links here: then only a look just before tells that nothing is replaced.
            Err(_) if fs::symlink_metadata(&self.path).is_ok() => {
                Err(io::ErrorKind::AlreadyExists.into())
            }
            Err(_) => self.rename_to_target(name, true),
        }
    }

    /// Takes a name away again that was given, unless another file has it by now.
    pub fn withdraw(&self) {
        self.remove(&self.path);
    }

    fn is_at(&self, path: &Path) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::symlink_metadata(path).map(identity);
        there.is_ok_and(|there| self.file.metadata().map(identity).ok() == Some(there))
    }

    fn remove(&self, path: &Path) {
        if self.is_at(path)
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("{} could not be removed: {error}", path.display());
        }
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.remove(name);
        }
    }
}

/// Where the kernel shows an open file.
fn proc_name(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Whether an error says that O_TMPFILE means nothing to the filesystem, or to a kernel that takes it for O_DIRECTORY.
fn has_no_nameless(error: &io::Error) -> bool {
    let refusals = [libc::EOPNOTSUPP, libc::EISDIR, libc::ENOENT, libc::ENOSYS];
    error
        .raw_os_error()
        .is_some_and(|errno| refusals.contains(&errno))
}

fn open(path: &Path, flags: i32, is_new: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(is_new);
    let direct = options
        .clone()
        .custom_flags(flags | libc::O_DIRECT)
        .open(path);
    match direct {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            log::info!(
                "{}: no O_DIRECT here, writing through the page cache",
                path.display()
            );
            if is_new {
                // By the time Linux finds out it has made the file. Where it has not, this is no failure.
                let _ = fs::remove_file(path);
            }
            options.custom_flags(flags).open(path)
        }
        result => result,
    }
}

/// `NAME.PID-N.tmp`, with the first N that `make` finds free.
fn with_free_name<T>(
    path: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    let mut number = 0;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}-{number}.tmp", std::process::id()));
        let name = PathBuf::from(name);
        match make(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < NAMES_MAX => {
                number += 1;
            }
            made => return made.map(|made| (name, made)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// Both ways to be unpublished; O_DIRECT wants whole pages, so what is written is told from what is not by length.
    fn both(check: impl Fn(&Path, &dyn Fn(&Path) -> Unpublished)) {
        for create in [Unpublished::create, Unpublished::named] {
            let directory = tempfile::tempdir().unwrap();
            check(directory.path(), &|path| create(path).unwrap());
            let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
            assert!(left.len() <= 1, "{left:?}");
        }
    }

    fn of_length(output: Unpublished, len: u64) -> Unpublished {
        output.file().set_len(len).unwrap();
        output
    }

    fn length(path: &Path) -> u64 {
        fs::metadata(path).unwrap().len()
    }

    #[test]
    fn a_name_is_given_once_and_replaces_only_by_force() {
        both(|directory, create| {
            let path = directory.join("m.gguf");
            let mut first = of_length(create(&path), 1);
            let mut second = of_length(create(&path), 2);
            first.publish(false).unwrap();
            let refused = second.publish(false).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(length(&path), 1);
            second.publish(true).unwrap();
            assert_eq!(length(&path), 2);
            // The first is not there any more: it has nothing to withdraw.
            first.withdraw();
            assert_eq!(length(&path), 2);
            second.withdraw();
            assert!(!path.exists());
            of_length(create(&path), 3).publish(true).unwrap();
            assert_eq!(length(&path), 3);
        });
    }

    #[test]
    fn dropped_early_it_leaves_nothing() {
        both(|directory, create| {
            let first = of_length(create(&directory.join("m")), 1);
            let second = create(&directory.join("m"));
            drop(first);
            assert!(second.name.as_ref().is_none_or(|name| name.exists()));
            drop(second);
            assert_eq!(fs::read_dir(directory).unwrap().count(), 0);
        });
    }

    /// A name that somebody took over is neither published nor removed.
    #[test]
    fn only_its_own_inode_gets_the_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m");
        let mut output = Unpublished::named(&path).unwrap();
        let name = output.name.clone().unwrap();
        fs::remove_file(&name).unwrap();
        fs::write(&name, "another's").unwrap();
        for force in [false, true] {
            let error = output.publish(force).unwrap_err();
            assert!(error.to_string().contains("another file"), "{error}");
        }
        drop(output);
        assert!(!path.exists());
        assert_eq!(fs::read(&name).unwrap(), b"another's");
    }

    #[test]
    fn what_is_written_is_what_is_published() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m");
        // Through the page cache, as on a filesystem without O_DIRECT.
        let file = File::create(path.with_extension("tmp")).unwrap();
        let mut output = Unpublished {
            file,
            path: path.clone(),
            name: Some(path.with_extension("tmp")),
        };
        output.file().write_all_at(b"whole", 0).unwrap();
        output.publish(false).unwrap();
        drop(output);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
