//! Writes the seeds of the corpus: `cargo xtask fuzz --seed-corpus`. From the conformance cases, the pages of the documentation,
//! the examples of RFC 9651, and what the contract makes hostile. Seeds that fuzzing found are not its business: their names
//! begin with `found-`, and they stay.

mod fences;
mod headers;
mod names;
mod pages;
mod policies;
mod records;
mod requests;
mod schedules;
mod told;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// The seeds of one target, by name.
#[derive(Default)]
pub struct Seeds(BTreeMap<String, Vec<u8>>);

impl Seeds {
    /// Adds a seed, unless there is one like it. Of several with one stem each gets a number.
    pub fn add(&mut self, stem: &str, seed: impl Into<Vec<u8>>) {
        let seed = seed.into();
        if self.0.values().any(|there| *there == seed) {
            return;
        }
        let clean = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let stem: String = stem.chars().map(clean).take(60).collect();
        let number = self.0.keys().filter(|name| name.rsplit_once('.').is_some_and(|(other, _)| other == stem)).count();
        self.0.insert(format!("{stem}.{number:03}"), seed);
    }
}

/// The conformance cases.
fn cases() -> Vec<Value> {
    serde_json::from_str(include_str!("../../../tests/conformance/cases.json")).expect("the cases are JSON")
}

fn main() {
    let cases = cases();
    let all = [
        ("lease_api", requests::seeds(&cases)),
        ("lock_fence", fences::seeds()),
        ("lock_header", headers::seeds(&cases)),
        ("lock_name", names::seeds(&cases)),
        ("policy", policies::seeds(&cases)),
        ("records", records::seeds(&cases)),
        ("table", schedules::seeds(&cases)),
        ("told", told::seeds()),
    ];
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, seeds) in all {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder).expect("a folder for the seeds");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("found-")) {
                found.push(fs::read(&path).expect("a seed"));
            } else {
                fs::remove_file(&path).expect("an old seed");
            }
        }
        let new = seeds.0.iter().filter(|(_, seed)| !found.contains(seed));
        let written = new.map(|(name, seed)| fs::write(folder.join(name), seed).expect("a seed is written")).count();
        println!("{target}: {written} seeds, and {} that fuzzing found", found.len());
    }
}
