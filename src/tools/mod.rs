//! What the programs offer besides running a model: measuring, making and looking at files.

pub mod raw;
