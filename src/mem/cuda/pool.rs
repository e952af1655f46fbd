//! The pool in VRAM: a window in which a host sees a model's image, and the memory behind it.
//!
//! As in the shared backing of host memory: resident runs have memory of their own, a slot is shown at the place of every
//! layer it serves, and all of it is mapped once, when the plan is made. The addresses never change. One allocation per
//! slot, because a driver maps memory from its first byte only. A place of a layer that is not in its slot shows another
//! layer's bytes: a lease is a promise here, and no MMU checks it. Another process can have the same window, to read only:
//! [`VramPool::export`], [`VramView::import`]. Place in `file -> catalog -> plan -> reader -> pool -> lease -> host`: the
//! pool of a GPU.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::context::Context;
use super::memory::{Access, AddressRange, Vram, granularity_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{PageRun, Plan};
use crate::units::HumanBytes;

/// Memory and the places where it is seen.
#[derive(Debug)]
struct Part {
    memory: Vram,
    places: Vec<Place>,
}

/// Where in the window memory is seen, from its first byte on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Offset in the window.
    pub offset_bytes: u64,
    /// How much of the memory.
    pub len_bytes: u64,
}

/// Memory of a pool for another process.
#[derive(Debug)]
pub struct VramPart {
    /// The memory.
    pub fd: OwnedFd,
    /// Its length.
    pub len_bytes: u64,
    /// Where it is seen.
    pub places: Vec<Place>,
}

/// All VRAM for weights of one model on one GPU.
#[derive(Debug)]
pub struct VramPool {
    // Unmapped before the memory is released.
    range: AddressRange,
    parts: Vec<Part>,
    context: Arc<Context>,
}

impl VramPool {
    /// Takes the memory that a plan of an image of `image_bytes` wants, and maps it.
    ///
    /// # Errors
    /// `Refused`, with the arithmetic, when the GPU has less VRAM free; `Unsupported` for a GPU whose memory comes in larger
    /// pages than the plan's; what the driver says. Nothing stays allocated.
    pub fn new(context: &Arc<Context>, image_bytes: u64, plan: &Plan) -> Result<Self> {
        let granularity = granularity_bytes(context)?;
        if granularity == 0 || !plan.page_bytes.is_multiple_of(granularity) {
            let text = format!(
                "GPU {} maps memory in pages of {}, the plan has pages of {}",
                context.index(),
                HumanBytes(granularity),
                HumanBytes(plan.page_bytes)
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        check_free(context, plan.resident_bytes + plan.ring_bytes)?;
        let places = places_of(plan)?;
        let mut pool = Self {
            range: AddressRange::reserve(context, image_bytes.max(plan.page_bytes))?,
            parts: Vec::with_capacity(places.len()),
            context: Arc::clone(context),
        };
        for (len_bytes, places) in places {
            let memory = Vram::new(context, len_bytes)?;
            show(&mut pool.range, &memory, &places, Access::ReadWrite)?;
            pool.parts.push(Part { memory, places });
        }
        Ok(pool)
    }

    /// The address of the image's first byte.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.range.base()
    }

    /// VRAM it holds.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.memory.len_bytes()).sum()
    }

    /// The GPU it is on.
    #[must_use]
    pub const fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Everything another process needs for the same window.
    ///
    /// # Errors
    /// What the driver says.
    pub fn export(&self) -> Result<Vec<VramPart>> {
        let parts = self.parts.iter();
        parts
            .map(|part| {
                Ok(VramPart {
                    fd: part.memory.export()?,
                    len_bytes: part.memory.len_bytes(),
                    places: part.places.clone(),
                })
            })
            .collect()
    }
}

/// The window of another process' pool.
#[derive(Debug)]
pub struct VramView {
    // Unmapped before the memory is released.
    range: AddressRange,
    _memory: Vec<Vram>,
}

impl VramView {
    /// Maps the parts of a pool, to be read.
    ///
    /// # Errors
    /// `Permission` where the driver does not take the descriptors; what else it says.
    pub fn import(context: &Arc<Context>, image_bytes: u64, parts: &[VramPart]) -> Result<Self> {
        let mut range = AddressRange::reserve(context, image_bytes)?;
        let mut memory = Vec::with_capacity(parts.len());
        for part in parts {
            let vram = Vram::import(context, part.fd.as_fd(), part.len_bytes)?;
            show(&mut range, &vram, &part.places, Access::Read)?;
            memory.push(vram);
        }
        Ok(Self {
            range,
            _memory: memory,
        })
    }

    /// The address of the image's first byte.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.range.base()
    }
}

fn show(range: &mut AddressRange, memory: &Vram, places: &[Place], access: Access) -> Result<()> {
    places
        .iter()
        .try_for_each(|place| range.map(place.offset_bytes, memory, place.len_bytes, access))
}

/// The memory of a plan: length and places of each resident run, then of each slot.
fn places_of(plan: &Plan) -> Result<Vec<(u64, Vec<Place>)>> {
    let place = |run: &PageRun| Place {
        offset_bytes: run.first_page * plan.page_bytes,
        len_bytes: run.page_count * plan.page_bytes,
    };
    let mut parts: Vec<(u64, Vec<Place>)> = plan
        .resident
        .iter()
        .map(|run| (place(run).len_bytes, vec![place(run)]))
        .collect();
    let mut slots = vec![Vec::new(); plan.slots_count as usize];
    for layer in &plan.layers {
        let Some(run) = &layer.transient else {
            continue;
        };
        let slot = layer
            .slot_index
            .and_then(|slot| slots.get_mut(slot as usize));
        let fits = run.page_count <= plan.slot_pages;
        let Some(slot) = slot.filter(|_| fits) else {
            let context = format!("{run:?} has no slot in VRAM");
            return Err(Error::new(ErrorKind::Internal, context));
        };
        slot.push(place(run));
    }
    let used = slots.into_iter().filter(|places| !places.is_empty());
    parts.extend(used.map(|places| (plan.slot_bytes(), places)));
    Ok(parts)
}

fn check_free(context: &Context, wanted_bytes: u64) -> Result<()> {
    let (free_bytes, total_bytes) = context.memory()?;
    if wanted_bytes <= free_bytes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{} ({wanted_bytes} bytes) of VRAM asked for, but GPU {} ({}) has {} free of {}; `nvidia-smi` shows who holds the \
             rest: end it, give less, or leave the weights in host memory",
            HumanBytes(wanted_bytes),
            context.index(),
            context.name(),
            HumanBytes(free_bytes),
            HumanBytes(total_bytes)
        ),
    ))
}
