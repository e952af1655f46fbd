//! `flea bench gds`: whether GPUDirect Storage works for a file, and what keeps it from it. With `--here` it is the child process
//! in which [`crate::io::gds`] tries cuFile.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use crate::error::Result;

const EXAMPLES: &str = "\
Examples:
  flea bench gds model.gguf --gpu 0
  flea bench stream model.gguf --gpu 0 --vram 8GiB --reader gds

cuFile is tried in a process of its own, within 10 s, and what it reads is compared with what the host reads. How fast it
is beside the way through host memory is what the second example measures, with and without --reader gds.";

/// What `flea bench gds` takes.
#[derive(Debug, Clone, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub struct GdsArgs {
    /// The file to read: a model, or anything on the same drive
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Which GPU, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub gpu: u32,

    /// Try it in this process, which may hang
    #[arg(long, hide = true)]
    pub here: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Tries it and tells.
///
/// # Errors
/// Without CUDA in this build, driver or GPU; what is wrong with the file. With `--here`, why it does not work.
#[cfg(feature = "cuda")]
pub(super) fn command(args: &GdsArgs) -> Result<()> {
    use std::sync::Arc;

    use crate::io::ShardFile;
    use crate::io::gds::Gds;
    use crate::mem::cuda::Context;

    let files: Arc<[ShardFile]> = Arc::from(vec![ShardFile::open(&args.file)?]);
    let context = Context::new(args.gpu)?;
    if args.here {
        return Gds::new(&context, &files)?.compare();
    }
    let refused = Gds::trusted(&context, &files).err();
    let reason = refused.as_ref().map(|error| error.context().to_owned());
    if args.json {
        return super::print_json(&serde_json::json!({
            "gds": reason.is_none(),
            "reason": reason,
            "gpu": context.name(),
            "gpu_index": args.gpu,
            "file": args.file.to_string_lossy(),
        }));
    }
    let file = args.file.display();
    super::print(&match reason {
        None => format!("GPUDirect Storage works from {file} to GPU {}\n", args.gpu),
        Some(reason) => format!("no GPUDirect Storage for {file}: {reason}\n"),
    })
}

/// Says that this build cannot.
///
/// # Errors
/// `Unsupported`.
#[cfg(not(feature = "cuda"))]
pub(super) fn command(_args: &GdsArgs) -> Result<()> {
    Err(crate::mem::gpu::not_built())
}
