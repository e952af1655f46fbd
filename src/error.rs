//! The one public error of the house: what went wrong (`kind`), and a sentence that names path, offset, errno and remedy.
//!
//! A kind maps one to one to a C status (include/flea.h) and to an exit code of the programs. The numbers are ABI:
//! they are appended to, never changed and never reused.

use std::fmt;

/// What went wrong, as the host can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument is wrong.
    Invalid = -1,
    /// The system has no memory, mapping or lock for it.
    NoMemory = -2,
    /// The drive or filesystem failed.
    Io = -3,
    /// The file is not a model, or says something that cannot be.
    Format = -4,
    /// No such file, tensor or layer.
    NotFound = -5,
    /// Not ready, and the caller would not wait.
    Again = -6,
    /// Not ready within the time given.
    Timeout = -7,
    /// This host itself holds what it waits for.
    Busy = -8,
    /// The daemon is not reachable, or went away.
    Connection = -9,
    /// Not allowed.
    Permission = -10,
    /// The memory budget is too small.
    Refused = -11,
    /// This kernel, build or file type cannot do it.
    Unsupported = -12,
    /// The file ends before its data does.
    Truncated = -13,
    /// The file changed while in use.
    Changed = -14,
    /// Bytes differ from their checksum.
    Checksum = -15,
    /// The lease was taken back.
    Revoked = -16,
    /// Stopped on request.
    Canceled = -17,
    /// A defect in flea.
    Internal = -99,
}

impl ErrorKind {
    /// The C status: negative, stable for ever.
    #[must_use]
    pub const fn status(self) -> i32 {
        self as i32
    }

    /// The name in include/flea.h, without its `FLEA_E_` prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "INVALID",
            Self::NoMemory => "NOMEM",
            Self::Io => "IO",
            Self::Format => "FORMAT",
            Self::NotFound => "NOTFOUND",
            Self::Again => "AGAIN",
            Self::Timeout => "TIMEOUT",
            Self::Busy => "BUSY",
            Self::Connection => "CONN",
            Self::Permission => "PERM",
            Self::Refused => "REFUSED",
            Self::Unsupported => "UNSUPPORTED",
            Self::Truncated => "TRUNCATED",
            Self::Changed => "CHANGED",
            Self::Checksum => "CHECKSUM",
            Self::Revoked => "REVOKED",
            Self::Canceled => "CANCELED",
            Self::Internal => "INTERNAL",
        }
    }

    /// The exit code of the programs: 1 other, 2 usage, 3 daemon unreachable, 4 budget or resource refused,
    /// 5 not a model file or its bytes are the cause, 130 interrupted.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Invalid => 2,
            Self::Connection => 3,
            Self::NoMemory | Self::Refused => 4,
            Self::Format | Self::Truncated | Self::Changed | Self::Checksum => 5,
            Self::Canceled => 130,
            _ => 1,
        }
    }

    /// Every kind, in the order of the statuses.
    pub const ALL: [Self; 18] = [
        Self::Invalid,
        Self::NoMemory,
        Self::Io,
        Self::Format,
        Self::NotFound,
        Self::Again,
        Self::Timeout,
        Self::Busy,
        Self::Connection,
        Self::Permission,
        Self::Refused,
        Self::Unsupported,
        Self::Truncated,
        Self::Changed,
        Self::Checksum,
        Self::Revoked,
        Self::Canceled,
        Self::Internal,
    ];
}

/// An error: its kind, a sentence for people, and the errno where the kernel gave one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    errno: Option<i32>,
}

/// Results of the house.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind`; `context` names what it is about and what would mend it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self {
            kind,
            context: context.into(),
            errno: None,
        }
    }

    /// An error the kernel gave: errno is kept and spelled out behind the context. ENOENT becomes `NotFound`,
    /// EACCES and EPERM `Permission`, ENOMEM `NoMemory`, the rest `Io`.
    pub fn os(errno: i32, context: impl fmt::Display) -> Self {
        let kind = match errno {
            libc::ENOENT => ErrorKind::NotFound,
            libc::EACCES | libc::EPERM => ErrorKind::Permission,
            libc::ENOMEM => ErrorKind::NoMemory,
            _ => ErrorKind::Io,
        };
        let text = std::io::Error::from_raw_os_error(errno);
        Self {
            kind,
            context: format!("{context}: {text}"),
            errno: Some(errno),
        }
    }

    /// [`Error::os`] with the calling thread's errno.
    pub fn last_os(context: impl fmt::Display) -> Self {
        Self::os(
            std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
            context,
        )
    }

    /// [`Error::os`] from a [`std::io::Error`].
    pub fn from_io(error: &std::io::Error, context: impl fmt::Display) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::os(errno, context),
            None => Self::new(ErrorKind::Io, format!("{context}: {error}")),
        }
    }

    /// The same error under another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The same error in other words; kind and errno stay.
    #[must_use]
    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.context = context.into();
        self
    }

    /// What went wrong.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The sentence for people.
    #[must_use]
    pub fn context(&self) -> &str {
        &self.context
    }

    /// The kernel's errno, where there was one.
    #[must_use]
    pub const fn errno(&self) -> Option<i32> {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published numbers. A change here is an ABI break.
    #[test]
    fn statuses_are_never_renumbered() {
        let numbers: Vec<i32> = ErrorKind::ALL.iter().map(|kind| kind.status()).collect();
        assert_eq!(
            numbers,
            [
                -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12, -13, -14, -15, -16, -17, -99
            ]
        );
    }

    #[test]
    fn the_kernel_errno_survives() {
        let error = Error::os(libc::ENOENT, "open model.gguf");
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::NotFound, Some(libc::ENOENT))
        );
        assert!(
            error
                .to_string()
                .starts_with("open model.gguf: No such file")
        );
        let told = error.with_context("in other words");
        assert_eq!(
            (told.kind(), told.errno(), told.context()),
            (ErrorKind::NotFound, Some(libc::ENOENT), "in other words")
        );
    }
}
