//! The simulator itself: a seed replays byte for byte, a planted wrong is found and shrinks to few steps, and a run in
//! which something never happens is no success.

use interlock_sim::run::{Scenario, Script, Until, run};
use interlock_sim::shrink::shrink;
use interlock_sim::state::Plant;
use interlock_sim::world::{Played, Yard};

const SCENARIOS: [Scenario; 3] = [Scenario::Core, Scenario::Backend, Scenario::Protocol];

fn play(scenario: Scenario, seed: u64, plant: Plant) -> Played {
    Script::make(scenario, seed).play(&mut Yard::new(), true, plant)
}

#[test]
fn a_seed_replays_byte_for_byte() {
    for scenario in SCENARIOS {
        let mut yard = Yard::new();
        for seed in 0..60 {
            let first = play(scenario, seed, Plant::Nothing);
            assert_eq!(first.violation, None, "{scenario:?} {seed}");
            // In a yard with used stacks, and without lines: the same all the same.
            let script = Script::make(scenario, seed);
            let again = script.play(&mut yard, true, Plant::Nothing);
            assert_eq!(first.trace.lines().join("\n"), again.trace.lines().join("\n"), "{scenario:?} {seed}");
            let silent = script.play(&mut yard, false, Plant::Nothing);
            assert_eq!(first.trace.digest(), silent.trace.digest(), "{scenario:?} {seed}");
            assert_eq!((&first.counts, &silent.trace.lines().len()), (&silent.counts, &0));
        }
    }
    let digest = |seed| play(Scenario::Core, seed, Plant::Nothing).trace.digest();
    assert_ne!(digest(1), digest(2), "another seed is another schedule");
}

#[test]
fn a_run_is_the_same_on_any_number_of_threads() {
    let ran = |threads| run(Scenario::Core, 7, Until::Schedules(600), threads);
    let (one, three) = (ran(1), ran(3));
    assert_eq!((one.failed, three.failed), (None, None));
    assert_eq!((one.digest, one.counts), (three.digest, three.counts));
}

#[test]
fn a_planted_wrong_is_found_and_shrinks_to_few_steps() {
    let plants = [
        (Plant::StaleWrite, Scenario::Core, 12),
        (Plant::StaleWrite, Scenario::Backend, 12),
        (Plant::WrongWake, Scenario::Core, 6),
        (Plant::FenceForgotten, Scenario::Core, 8),
        (Plant::StaleWrite, Scenario::Protocol, 14),
    ];
    for (plant, scenario, most) in plants {
        let mut yard = Yard::new();
        let fails = |seed: &u64| Script::make(scenario, *seed).play(&mut yard, false, plant).violation.is_some();
        let seed = (1..3000).find(fails).expect("the wrong is never found");
        let whole = Script::make(scenario, seed);
        let (short, violation) = shrink(&whole, plant).expect("it fails");
        println!("{plant:?}, {scenario:?}, seed {seed}: {} steps, then\n{short}{violation}", whole.len());
        assert!(short.len() <= most, "{plant:?}: {} steps\n{short}", short.len());
        let again = short.play(&mut yard, true, plant);
        assert_eq!(again.violation, Some(violation), "the short one fails by itself");
        let innocent = short.play(&mut yard, false, Plant::Nothing);
        assert_eq!(innocent.violation, None, "without the wrong it does not");
    }
}

#[test]
fn a_run_without_successes_says_what_is_missing() {
    let few = run(Scenario::Core, 1, Until::Schedules(1), 1);
    assert!(few.counts.missing(Scenario::Core.parts()).contains(&"cycles refused"));
    let many = run(Scenario::Core, 1, Until::Schedules(4000), 2);
    assert_eq!(many.counts.missing(Scenario::Core.parts()), Vec::<&str>::new());
}
