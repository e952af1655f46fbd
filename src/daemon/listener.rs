//! The socket that clients connect to: made, or inherited from the service manager; and who is let in.

use super::settings::Settings;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::Socket;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, bind, getsockopt,
    listen, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long another daemon may take to listen.
const PATIENCE: Duration = Duration::from_secs(5);

/// A socket that listens. One that was made here is removed when it is dropped.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    made: Option<(PathBuf, u64)>,
}

impl Listener {
    /// Listens where the settings say, with the mode they say.
    ///
    /// # Errors
    /// `Busy` when a daemon answers there already; what bind says.
    pub fn bind(settings: &Settings) -> Result<Self> {
        let path = &settings.socket;
        let failed = |what: &str, errno: Errno| {
            Error::os(errno as i32, format!("{what} {}", path.display()))
        };
        let _alone = alone_in(path)?;
        remove_stale(path)?;
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(|errno| failed("make the socket", errno))?;
        let address = UnixAddr::new(path).map_err(|errno| failed("listen at", errno))?;
        // Nobody can connect before the mode is right.
        let before = umask(Mode::from_bits_truncate(0o777));
        let bound = bind(fd.as_raw_fd(), &address);
        umask(before);
        bound.map_err(|errno| failed("listen at", errno))?;
        let inode = std::fs::metadata(path)
            .map_err(|error| Error::from_io(&error, path.display()))?
            .ino();
        let listener = Self {
            fd,
            made: Some((path.clone(), inode)),
        };
        listen(&listener.fd, Backlog::MAXCONN).map_err(|errno| failed("listen at", errno))?;
        let mode = std::fs::Permissions::from_mode(settings.socket_mode);
        std::fs::set_permissions(path, mode)
            .map_err(|error| Error::from_io(&error, format_args!("chmod {}", path.display())))?;
        Ok(listener)
    }

    /// Takes over a socket that listens already.
    ///
    /// # Errors
    /// `Invalid` when it is not a listening SOCK_SEQPACKET socket.
    pub fn inherited(fd: OwnedFd) -> Result<Self> {
        let kind = getsockopt(&fd, sockopt::SockType);
        let listening = getsockopt(&fd, sockopt::AcceptConn);
        if kind != Ok(SockType::SeqPacket) || listening != Ok(true) {
            let context = "the inherited descriptor is no listening SOCK_SEQPACKET socket (ListenSequentialPacket=)";
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))
            .map_err(|errno| Error::os(errno as i32, "set up the inherited socket"))?;
        Ok(Self { fd, made: None })
    }

    /// Takes the next connection; `None` when nobody waits.
    ///
    /// # Errors
    /// What accept says: too many open files, above all.
    pub fn accept(&self) -> Result<Option<(Socket, UnixCredentials)>> {
        let Some(socket) = Socket::accept(self.fd.as_fd())? else {
            return Ok(None);
        };
        let peer = getsockopt(&socket, sockopt::PeerCredentials);
        let peer = peer.map_err(|errno| Error::os(errno as i32, "ask who connected"))?;
        Ok(Some((socket, peer)))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, inode)) = &self.made else {
            return;
        };
        // Another daemon may have taken the place meanwhile: its socket is not ours to remove.
        if std::fs::metadata(path).is_ok_and(|metadata| metadata.ino() == *inode) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Keeps other daemons out of the socket's directory while it is held: of two that start at once, one would take the
/// other's socket, bound but not listening yet, for a stale one.
fn alone_in(path: &Path) -> Result<Flock<File>> {
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    let mut file = File::open(directory)
        .map_err(|error| Error::from_io(&error, format_args!("open {}", directory.display())))?;
    let began = Instant::now();
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) if began.elapsed() < PATIENCE => file,
            Err((_, errno)) => {
                let context = format!(
                    "lock {} (another daemon is starting there)",
                    directory.display()
                );
                return Err(Error::os(errno as i32, context));
            }
        };
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        let context = format!("{}: there is something that is no socket", path.display());
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    match Socket::connect(path, Duration::from_secs(1)) {
        Ok(_) => Err(Error::new(
            ErrorKind::Busy,
            format!("{}: a daemon answers there already", path.display()),
        )),
        Err(error) if error.errno() == Some(libc::ECONNREFUSED) => std::fs::remove_file(path)
            .map_err(|error| Error::from_io(&error, format_args!("remove {}", path.display()))),
        Err(error) => Err(error),
    }
}

/// Whether a peer may talk to the daemon at all.
#[must_use]
pub fn admits(peer: &UnixCredentials, settings: &Settings) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == own {
        return true;
    }
    let anybody = settings.users.is_empty() && settings.groups.is_empty();
    anybody || settings.users.contains(&peer.uid()) || settings.groups.contains(&peer.gid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn of_daemons_that_start_at_once_one_listens() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings {
            socket: directory.path().join("flea.sock"),
            ..Settings::default()
        };
        for _ in 0..20 {
            // What a daemon that was killed leaves behind.
            drop(std::os::unix::net::UnixListener::bind(&settings.socket).unwrap());
            let start = Barrier::new(4);
            let results: Vec<Result<Listener>> = std::thread::scope(|scope| {
                let bind = || {
                    start.wait();
                    Listener::bind(&settings)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let refused = results.iter().filter_map(|result| result.as_ref().err());
            let kinds: Vec<ErrorKind> = refused.map(Error::kind).collect();
            assert_eq!(kinds, [ErrorKind::Busy; 3], "{results:?}");
            Socket::connect(&settings.socket, Duration::from_secs(1)).unwrap();
            drop(results);
            assert!(!settings.socket.exists());
        }
    }
}
