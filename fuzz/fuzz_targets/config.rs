//! Any text as flead.toml: a configuration, or an error that names its place; and what is written is read back the same.
#![no_main]

use flea::daemon::config::{Overrides, parse, reloaded};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|text: &str| {
    let file = |text: &str| parse(Some((Path::new("fuzz.toml"), text)), &Overrides::default());
    match file(text) {
        Err(error) => assert!(error.to_string().starts_with("fuzz.toml:"), "{error}"),
        Ok(loaded) => {
            let written = loaded.config.to_string();
            assert_eq!(file(&written).expect("what was written").config, loaded.config);
            assert_eq!(reloaded(&loaded.config, &loaded.config), loaded.config);
        }
    }
});
