//! A SOCK_SEQPACKET socket: whole packets, descriptors beside them, and who is on the other side.
//!
//! Sending never raises SIGPIPE. A packet that was cut is an error, never a shorter packet. Descriptors are taken only
//! where they are expected: what a stranger sends along otherwise is closed by the kernel.
#![allow(unsafe_code)]

use super::{DESCRIPTORS_MAX, PACKET_BYTES_MAX};
use crate::error::{Error, ErrorKind, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// One packet as it came in.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What was sent along.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// Connects to the daemon at `path`.
    ///
    /// # Errors
    /// `Connection`, naming the path; `Permission` where the socket may not be used.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .map_err(|errno| Error::os(errno as i32, "make a socket"))?;
        // A connect waits while the daemon's queue is full; the send timeout is what bounds that.
        let bound = TimeVal::new(
            i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            i64::from(timeout.subsec_micros()),
        );
        setsockopt(&fd, sockopt::SendTimeout, &bound)
            .map_err(|errno| Error::os(errno as i32, "bound a connect"))?;
        let address = UnixAddr::new(path).map_err(|errno| {
            let what = format!("{}: not the path of a socket", path.display());
            Error::os(errno as i32, what).with_kind(ErrorKind::Invalid)
        })?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => Ok(Self { fd }),
            Err(errno) => {
                let kind = match errno {
                    Errno::EACCES | Errno::EPERM => ErrorKind::Permission,
                    _ => ErrorKind::Connection,
                };
                let what = format!(
                    "no daemon answers at {} (is flead running?)",
                    path.display()
                );
                Err(Error::os(errno as i32, what).with_kind(kind))
            }
        }
    }

    /// Takes the next connection of a listening socket; `None` when nobody waits.
    ///
    /// # Errors
    /// What accept says: too many open files, above all.
    pub fn accept(listener: BorrowedFd<'_>) -> Result<Option<Self>> {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(raw) => {
                // SAFETY: accept has just made this descriptor for us, and nobody else knows it.
                let fd = unsafe { OwnedFd::from_raw_fd(raw) };
                Ok(Some(Self { fd }))
            }
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => Ok(None),
            Err(errno) => Err(Error::os(errno as i32, "accept a connection")),
        }
    }

    /// Sends one packet. `dont_wait`: answer `Again` instead of waiting for the other side to read.
    ///
    /// # Errors
    /// `Connection` when the other side is gone, `Again`.
    pub fn send(&self, packet: &[u8], descriptors: &[RawFd], dont_wait: bool) -> Result<()> {
        let mut flags = MsgFlags::MSG_NOSIGNAL;
        flags.set(MsgFlags::MSG_DONTWAIT, dont_wait);
        let rights = [ControlMessage::ScmRights(descriptors)];
        let along: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.fd.as_raw_fd(),
                &[IoSlice::new(packet)],
                along,
                flags,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(Error::new(ErrorKind::Again, "the other side does not read"));
                }
                Err(errno) => return Err(gone(errno)),
            }
        }
    }

    /// True while the other side has not taken everything that was sent to it.
    #[must_use]
    pub fn unread(&self) -> bool {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the descriptor and the integer live over the call, which writes that integer and nothing else.
        let rc = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        rc != 0 || bytes > 0
    }

    /// Receives one packet; `None` when the other side has hung up.
    ///
    /// # Errors
    /// `Again` with `dont_wait` and nothing there, `Invalid` for a packet that is too long, `Connection`.
    pub fn receive(&self, with_descriptors: bool, dont_wait: bool) -> Result<Option<Packet>> {
        // One byte more than allowed tells a packet that is too long from one that just fits.
        let mut bytes = vec![0u8; PACKET_BYTES_MAX + 1];
        let mut space = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
        let mut flags = MsgFlags::MSG_CMSG_CLOEXEC;
        flags.set(MsgFlags::MSG_DONTWAIT, dont_wait);
        let (len, cut, descriptors) = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let room = with_descriptors.then_some(space.as_mut_slice());
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, room, flags) {
                Ok(message) => {
                    let cut = message.flags.contains(MsgFlags::MSG_TRUNC);
                    break (message.bytes, cut, owned(&message));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    return Err(Error::new(ErrorKind::Again, "no packet is there"));
                }
                Err(errno) => return Err(gone(errno)),
            }
        };
        if len == 0 {
            return Ok(None);
        }
        if cut || len > PACKET_BYTES_MAX {
            let context = format!("a packet of more than {PACKET_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        bytes.truncate(len);
        Ok(Some(Packet { bytes, descriptors }))
    }

    /// [`Socket::receive`] that waits until `deadline`; `None` waits for ever.
    ///
    /// # Errors
    /// `Timeout`, and those of [`Socket::receive`].
    pub fn receive_until(&self, deadline: Option<Instant>) -> Result<Option<Packet>> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                let context = "the daemon did not answer in time";
                return Err(Error::new(ErrorKind::Timeout, context));
            }
            if self.readable(left)? {
                match self.receive(true, true) {
                    Err(error) if error.kind() == ErrorKind::Again => {}
                    result => return result,
                }
            }
        }
    }

    /// Waits until something can be received (or the other side has hung up); false when `timeout` passed.
    ///
    /// # Errors
    /// What poll says.
    pub fn readable(&self, timeout: Option<Duration>) -> Result<bool> {
        let timeout = match timeout {
            None => PollTimeout::NONE,
            // Rounded up, so that a wait of half a millisecond does not become a busy loop.
            Some(time) => PollTimeout::try_from(time.as_millis().saturating_add(1).min(60_000))
                .unwrap_or(PollTimeout::ZERO),
        };
        self.poll(PollFlags::POLLIN, timeout)
    }

    /// True when the other side has hung up, whatever it sent before.
    #[must_use]
    pub fn hung_up(&self) -> bool {
        self.poll(PollFlags::empty(), PollTimeout::ZERO)
            .unwrap_or(true)
    }

    fn poll(&self, flags: PollFlags, timeout: PollTimeout) -> Result<bool> {
        let mut entries = [PollFd::new(self.fd.as_fd(), flags)];
        match poll(&mut entries, timeout) {
            // A hang-up is always told, whatever was asked for.
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(Error::os(errno as i32, "wait for the daemon")),
        }
    }
}

fn gone(errno: Errno) -> Error {
    Error::os(errno as i32, "the connection is gone").with_kind(ErrorKind::Connection)
}

/// The descriptors of a message.
fn owned(message: &nix::sys::socket::RecvMsg<'_, '_, ()>) -> Vec<OwnedFd> {
    let Ok(parts) = message.cmsgs() else {
        return Vec::new();
    };
    let raw = parts.flat_map(|part| match part {
        ControlMessageOwned::ScmRights(raw) => raw,
        _ => Vec::new(),
    });
    // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
    raw.map(|raw| unsafe { OwnedFd::from_raw_fd(raw) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::socketpair;

    #[test]
    fn what_was_sent_is_unread_until_it_is_taken() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (one, other) = (Socket::from(one), Socket::from(other));
        assert!(!one.unread());
        one.send(b"{}", &[], true).unwrap();
        assert!(one.unread() && !other.unread());
        other.receive(false, true).unwrap();
        assert!(!one.unread());
    }
}
