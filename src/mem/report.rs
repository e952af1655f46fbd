//! Which pages a pool really got: measured in /proc/self/smaps, not assumed from what was asked.
//!
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the pool's account of itself.

use super::limits::{kilobytes, mapping_header};
use crate::error::{Error, Result};
use crate::units::{PAGE_2M, PAGE_4K};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::sync::Arc;

/// Below this share of huge pages the pool counts as one of small pages: a few unlucky pages are not worth a warning.
const HUGE_ENOUGH: f64 = 0.95;

/// Where a pool's pages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PageSource {
    /// Anonymous memory, small pages wanted.
    Anonymous,
    /// Anonymous memory with MADV_HUGEPAGE.
    AnonymousHuge,
    /// A memfd of reserved huge pages.
    Hugetlb,
    /// A memfd with transparent huge pages.
    MemfdHuge,
    /// A nameless file on the tmpfs mounted there with `huge=`; its size cannot be sealed.
    Tmpfs(String),
    /// A memfd of small pages.
    Memfd,
}

impl fmt::Display for PageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("anonymous memory"),
            Self::AnonymousHuge => f.write_str("anonymous memory with transparent huge pages"),
            Self::Hugetlb => f.write_str("memfd of reserved huge pages"),
            Self::MemfdHuge => f.write_str("memfd with transparent huge pages"),
            Self::Tmpfs(point) => write!(f, "tmpfs with huge pages at {point}"),
            Self::Memfd => f.write_str("memfd"),
        }
    }
}

/// Something that was wanted and not had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fallback {
    /// 2 MiB pages were wanted, 4 KiB pages came.
    SmallPages {
        /// Why, and what would mend it.
        reason: String,
    },
    /// The memory could not be bound to the drive's NUMA node.
    NotBound {
        /// Why.
        reason: String,
    },
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SmallPages { reason } => write!(f, "4 KiB instead of 2 MiB pages: {reason}"),
            Self::NotBound { reason } => write!(f, "memory is not bound to a node: {reason}"),
        }
    }
}

/// What a pool is made of, measured.
#[derive(Debug, Clone, PartialEq)]
pub struct PageReport {
    /// The page size the pool got.
    pub page_bytes: u64,
    /// Share of the pool's bytes on huge pages, 0 to 1.
    pub huge_page_share: f64,
    /// Where the pages come from.
    pub source: PageSource,
    /// What was wanted and not had.
    pub fallbacks: Vec<Fallback>,
}

/// Measures a pool from any thread, for as long as the pool lives. One call walks the page tables once: some milliseconds for many GiB.
#[derive(Debug, Clone)]
pub struct PageProbe {
    pub(super) inner: Arc<ProbeData>,
}

/// What a probe knows.
#[derive(Debug)]
pub(super) struct ProbeData {
    /// Where the pool's pages can be: (address, bytes).
    pub(super) ranges: Vec<(usize, usize)>,
    pub(super) pool_bytes: u64,
    /// The page size of the plan.
    pub(super) wanted_bytes: u64,
    pub(super) source: PageSource,
    pub(super) fallbacks: Vec<Fallback>,
}

impl PageProbe {
    /// Measures now.
    ///
    /// # Errors
    /// `Io` when /proc/self/smaps cannot be read.
    pub fn report(&self) -> Result<PageReport> {
        let data = &*self.inner;
        let file = std::fs::File::open("/proc/self/smaps")
            .map_err(|error| Error::from_io(&error, "open /proc/self/smaps"))?;
        let huge_bytes = huge_bytes(BufReader::with_capacity(1 << 16, file), &data.ranges)?;
        let share = match data.pool_bytes {
            0 => 0.0,
            bytes => (huge_bytes as f64 / bytes as f64).min(1.0),
        };
        let small = data.wanted_bytes >= PAGE_2M && data.pool_bytes > 0 && share < HUGE_ENOUGH;
        let mut fallbacks = data.fallbacks.clone();
        let told = fallbacks
            .iter()
            .any(|fallback| matches!(fallback, Fallback::SmallPages { .. }));
        if small && !told {
            fallbacks.push(Fallback::SmallPages {
                reason: why_small(share, &data.source),
            });
        }
        Ok(PageReport {
            page_bytes: if small { PAGE_4K } else { data.wanted_bytes },
            huge_page_share: share,
            source: data.source.clone(),
            fallbacks,
        })
    }
}

fn why_small(share: f64, source: &PageSource) -> String {
    let setting = std::fs::read_to_string(THP_ENABLED).unwrap_or_default();
    if setting.contains("[never]") && *source == PageSource::AnonymousHuge {
        return format!(
            "transparent huge pages are switched off ({THP_ENABLED} is never; set it to madvise)"
        );
    }
    format!(
        "only {:.0} % of the pool is on huge pages ({source}); memory is fragmented: `sysctl vm.compact_memory=1` helps",
        share * 100.0
    )
}

/// The switch of anonymous huge pages.
const THP_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Bytes on huge pages in the mappings that lie in `ranges`.
fn huge_bytes(smaps: impl BufRead, ranges: &[(usize, usize)]) -> Result<u64> {
    const FIELDS: [&str; 4] = [
        "AnonHugePages:",
        "ShmemPmdMapped:",
        "Shared_Hugetlb:",
        "Private_Hugetlb:",
    ];
    let mut inside_bytes = 0;
    let mut sum = 0;
    for line in smaps.lines() {
        let line = line.map_err(|error| Error::from_io(&error, "read /proc/self/smaps"))?;
        if line.starts_with(|first: char| first.is_ascii_uppercase()) {
            if inside_bytes > 0
                && let Some(value) = FIELDS.iter().find_map(|name| line.strip_prefix(name))
            {
                sum += kilobytes(value).unwrap_or(0).min(inside_bytes);
            }
        } else if let Some(((start, end), _)) = mapping_header(&line) {
            inside_bytes = ranges
                .iter()
                .map(|&(base, len)| end.min(base + len).saturating_sub(start.max(base)) as u64)
                .sum();
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
100000-900000 rw-p 00000000 00:00 0
Rss:                8192 kB
AnonHugePages:      6144 kB
Private_Hugetlb:       0 kB
VmFlags: rd wr mr mw me dc ac sd hg
900000-b00000 ---p 00000000 00:00 0
AnonHugePages:         0 kB
c00000-1000000 rw-p 00000000 00:00 0                                     [heap]
AnonHugePages:      4096 kB
2000000-2400000 r--s 00000000 00:0f 99      /memfd:flea-pool (deleted)
ShmemPmdMapped:     2048 kB
Shared_Hugetlb:     2048 kB
";

    fn of(ranges: &[(usize, usize)]) -> u64 {
        huge_bytes(SMAPS.as_bytes(), ranges).unwrap()
    }

    #[test]
    fn only_the_pool_is_counted() {
        assert_eq!(of(&[(0x100000, 0xa00000)]), 6144 << 10, "not the heap");
        assert_eq!(of(&[(0x2000000, 0x400000)]), 4096 << 10);
        assert_eq!(
            of(&[(0x100000, 0x200000)]),
            0x200000,
            "no more than the overlap"
        );
        assert_eq!(of(&[]), 0);
        assert!(huge_bytes(&b"\xff\xfe"[..], &[]).is_err());
    }

    #[test]
    fn a_missing_huge_page_is_told() {
        let probe = PageProbe {
            inner: Arc::new(ProbeData {
                ranges: vec![(1 << 40, 1 << 21)],
                pool_bytes: 1 << 21,
                wanted_bytes: PAGE_2M,
                source: PageSource::AnonymousHuge,
                fallbacks: Vec::new(),
            }),
        };
        let report = probe.report().unwrap();
        assert_eq!((report.page_bytes, report.huge_page_share), (PAGE_4K, 0.0));
        assert!(
            matches!(report.fallbacks[..], [Fallback::SmallPages { .. }]),
            "{report:?}"
        );
        assert!(
            report.fallbacks[0]
                .to_string()
                .starts_with("4 KiB instead of 2 MiB")
        );
    }
}
