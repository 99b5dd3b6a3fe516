//! The committed corpus goes through the targets with whatever compiler the tests have, so that what fuzzing once found is
//! seen again without a fuzzer.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use interlock_fuzz::TARGETS;

/// How long one input may take, without optimisation and beside other tests.
const LONGEST: Duration = Duration::from_secs(2);

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = corpus().join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

#[test]
fn every_seed_passes_its_target() {
    for (target, run) in TARGETS {
        for (name, seed) in seeds(target) {
            println!("{target}/{name}");
            let began = Instant::now();
            run(&seed);
            let took = began.elapsed();
            assert!(took < LONGEST, "{target}/{name} took {took:?}");
        }
    }
}

#[test]
fn the_corpus_is_worth_its_room() {
    let (mut count, mut bytes) = (0, 0);
    for (target, _) in TARGETS {
        let seeds = seeds(target);
        println!("{target}: {} seeds, {} bytes", seeds.len(), seeds.iter().map(|(_, seed)| seed.len()).sum::<usize>());
        assert!(seeds.len() >= 40, "{target} has {} seeds", seeds.len());
        let mut contents: Vec<&Vec<u8>> = seeds.iter().map(|(_, seed)| seed).collect();
        contents.sort();
        assert!(contents.windows(2).all(|pair| pair[0] != pair[1]), "{target} has a seed twice");
        count += seeds.len();
        bytes += contents.iter().map(|seed| seed.len()).sum::<usize>();
    }
    assert!(count >= 500, "{count} seeds");
    assert!(bytes < 1024 * 1024, "{bytes} bytes of seeds");
}

/// Each target is one file of libFuzzer's that calls the function of its name.
#[test]
fn the_targets_of_libfuzzer_are_these() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("libfuzzer");
    let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    let mut files: Vec<String> = fs::read_dir(folder.join("fuzz_targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    assert_eq!(files, TARGETS.map(|(name, _)| name));
    for name in files {
        let text = fs::read_to_string(folder.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(text.contains(&format!("interlock_fuzz::{name}::run(data)")), "{text}");
        assert!(manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")));
    }
}
