//! How a host names GPUs: `0,1`, with what weights may take of the memory of each: `8GiB`, or `8GiB,4GiB`; and what it is told
//! of each.
//!
//! Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: what a model on GPUs is opened with.

#[cfg(feature = "cuda")]
use std::path::Path;
use std::str::FromStr;

#[cfg(feature = "cuda")]
use crate::engine::gpu::{GpuOptions, GpuStats, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::units::MemorySpec;

/// A GPU, and what weights may take of its memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuShare {
    /// Its number, from 0.
    pub index: u32,
    /// A size, or a share of the model.
    pub vram: MemorySpec,
}

/// Most GPUs: as many devices as llama.cpp knows.
const GPUS_MAX: usize = 16;

/// GPUs by their numbers, each once, in the order of the layers they are to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuList(pub Vec<u32>);

impl FromStr for GpuList {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut numbers: Vec<u32> = Vec::new();
        for one in text.split(',') {
            let number = one.trim().parse().map_err(|_| {
                format!("'{text}' names no GPUs: write their numbers, from 0, such as 0 or 0,1")
            })?;
            if numbers.contains(&number) {
                return Err(format!("'{text}': GPU {number} is named twice"));
            }
            numbers.push(number);
        }
        if numbers.len() > GPUS_MAX {
            return Err(format!("'{text}': at most {GPUS_MAX} GPUs are possible"));
        }
        Ok(Self(numbers))
    }
}

/// Sizes: one for each GPU, or one that each of them has.
#[derive(Debug, Clone, PartialEq)]
pub struct VramList(pub Vec<MemorySpec>);

impl FromStr for VramList {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let size = |one: &str| match one.parse()? {
            MemorySpec::Auto | MemorySpec::Bytes(0) => {
                Err("write 8GiB, 8GB or, of the model, 25%".to_owned())
            }
            size => Ok(size),
        };
        text.split(',')
            .map(size)
            .collect::<std::result::Result<_, _>>()
            .map(Self)
    }
}

impl VramList {
    /// What each of these GPUs gives.
    ///
    /// # Errors
    /// `Invalid` for sizes that are neither one nor as many as GPUs.
    pub fn of(&self, gpus: &GpuList) -> Result<Vec<GpuShare>> {
        let (GpuList(numbers), Self(sizes)) = (gpus, self);
        if sizes.len() != 1 && sizes.len() != numbers.len() {
            let context = format!(
                "{} sizes of VRAM for {} GPUs: give one for all, or one for each",
                sizes.len(),
                numbers.len()
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        let shares = numbers.iter().zip(sizes.iter().cycle());
        Ok(shares
            .map(|(&index, &vram)| GpuShare { index, vram })
            .collect())
    }
}

/// What GPUs are opened with; `slots_count` 0 is the default.
///
/// # Errors
/// `Invalid` where it is not said how much of a GPU weights may take; what reading the model for its size gives.
#[cfg(feature = "cuda")]
pub fn options(path: &Path, gpus: &[GpuShare], slots_count: u32) -> Result<Vec<GpuOptions>> {
    let is_share = |gpu: &GpuShare| matches!(gpu.vram, MemorySpec::Percent(_));
    let model_bytes = match gpus.iter().any(is_share) {
        true => crate::engine::gpu::catalog_of(path)?.0.model_bytes,
        false => 0,
    };
    let options = |gpu: &GpuShare| {
        let vram_bytes = match gpu.vram {
            MemorySpec::Bytes(bytes) => bytes,
            MemorySpec::Percent(percent) => (model_bytes as f64 * percent / 100.0) as u64,
            MemorySpec::Auto => {
                let context =
                    "how much of the GPU's memory weights may take has to be said: 8GiB, or 25%";
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        };
        Ok(GpuOptions {
            index: gpu.index,
            vram_bytes,
            slots_count: match slots_count {
                0 => crate::plan::SLOTS_DEFAULT,
                count => count,
            },
        })
    };
    gpus.iter().map(options).collect()
}

/// The plan of a GPU's memory in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GpuFigures {
    /// Which GPU.
    pub index: u32,
    /// What weights may take of its memory.
    pub vram_budget_bytes: u64,
    /// What stays there.
    pub vram_resident_bytes: u64,
    /// All slots there.
    pub vram_ring_bytes: u64,
    /// What comes over the link in each pass; of a compressed model known exactly once host memory is planned.
    pub link_bytes_per_pass: u64,
    /// The weights in it: more, where they come compressed.
    pub link_weights_bytes_per_pass: u64,
    /// Its first layer.
    pub first_layer: u32,
    /// How many layers it has.
    pub layer_count: u32,
    /// What has come over its link so far.
    pub link: LinkCounters,
}

impl GpuFigures {
    /// Those of two GPUs together, under the number of the first.
    #[must_use]
    pub fn with(self, next: Self) -> Self {
        let (link, more) = (self.link, next.link);
        Self {
            vram_budget_bytes: self.vram_budget_bytes + next.vram_budget_bytes,
            vram_resident_bytes: self.vram_resident_bytes + next.vram_resident_bytes,
            vram_ring_bytes: self.vram_ring_bytes + next.vram_ring_bytes,
            link_bytes_per_pass: self.link_bytes_per_pass + next.link_bytes_per_pass,
            link_weights_bytes_per_pass: self.link_weights_bytes_per_pass
                + next.link_weights_bytes_per_pass,
            layer_count: self.layer_count + next.layer_count,
            link: LinkCounters {
                h2d_bytes: link.h2d_bytes + more.h2d_bytes,
                h2d_pinned_bytes: link.h2d_pinned_bytes + more.h2d_pinned_bytes,
                h2d_resident_bytes: link.h2d_resident_bytes + more.h2d_resident_bytes,
                copies: link.copies + more.copies,
                pinned_bytes: link.pinned_bytes + more.pinned_bytes,
                unpacked_bytes: link.unpacked_bytes + more.unpacked_bytes,
            },
            ..self
        }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn of(part: &Part) -> Self {
        let (model, layers) = (part.model(), part.layers());
        let vram = model.vram();
        Self {
            index: model.context().index(),
            vram_budget_bytes: vram.plan.weight_budget_bytes,
            vram_resident_bytes: vram.plan.resident_bytes,
            vram_ring_bytes: vram.plan.ring_bytes,
            link_bytes_per_pass: model.link_bytes_per_pass(),
            link_weights_bytes_per_pass: vram.link_bytes_per_pass(),
            first_layer: layers.start,
            layer_count: layers.end - layers.start,
            link: LinkCounters::of(&model.stats()),
        }
    }
}

/// What has come over the link so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Bytes copied into the memory of a GPU.
    pub h2d_bytes: u64,
    /// Of those: out of pinned memory.
    pub h2d_pinned_bytes: u64,
    /// Of those: into pages that stay there.
    pub h2d_resident_bytes: u64,
    /// Copies they took.
    pub copies: u64,
    /// Host memory that is pinned.
    pub pinned_bytes: u64,
    /// Weights that came compressed and were unpacked on the GPU.
    pub unpacked_bytes: u64,
}

#[cfg(feature = "cuda")]
impl LinkCounters {
    pub(super) const fn of(stats: &GpuStats) -> Self {
        Self {
            h2d_bytes: stats.h2d_bytes,
            h2d_pinned_bytes: stats.h2d_pinned_bytes,
            h2d_resident_bytes: stats.h2d_resident_bytes,
            copies: stats.copies,
            pinned_bytes: stats.pinned_bytes,
            unpacked_bytes: stats.unpacked_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn one_size_is_each_gpus_and_many_are_theirs_in_turn() {
        let shares = |gpus: &str, vram: &str| {
            let (gpus, vram) = (gpus.parse().unwrap(), vram.parse::<VramList>().unwrap());
            let shares = vram.of(&gpus)?;
            Ok::<_, Error>(
                shares
                    .iter()
                    .map(|one| (one.index, one.vram))
                    .collect::<Vec<_>>(),
            )
        };
        let (one, half) = (MemorySpec::Bytes(GIB), MemorySpec::Percent(50.0));
        assert_eq!(shares("0", "1GiB").unwrap(), [(0, one)]);
        assert_eq!(shares("2,0", "1GiB").unwrap(), [(2, one), (0, one)]);
        assert_eq!(shares(" 0, 1", "1GiB, 50%").unwrap(), [(0, one), (1, half)]);
        for (gpus, vram) in [("0,1", "1GiB,1GiB,1GiB"), ("0", "1GiB,1GiB")] {
            let error = shares(gpus, vram).unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.context().contains("sizes"));
        }
    }

    #[test]
    fn what_names_no_gpu_or_no_size_says_so() {
        for text in ["", "a", "0,", "-1", "0;1", "4294967296", "0,x"] {
            assert!(
                text.parse::<GpuList>().unwrap_err().contains("0,1"),
                "{text}"
            );
        }
        let many: Vec<String> = (0..17).map(|index: u32| index.to_string()).collect();
        assert!(
            many.join(",")
                .parse::<GpuList>()
                .unwrap_err()
                .contains("at most 16")
        );
        assert!(
            "1,0,1"
                .parse::<GpuList>()
                .unwrap_err()
                .contains("GPU 1 is named twice")
        );
        for text in ["", "auto", "0", "8GiB,", "8GiB,auto", "much"] {
            assert!(text.parse::<VramList>().is_err(), "{text}");
        }
    }
}
