//! Schedules: the conformance cases in the steps of the target, and a few of its own.

use interlock_fuzz::table::{LOCKS, Step};
use serde_json::Value;

use crate::Seeds;

/// The modes by their place in `Mode::ALL`.
fn mode(step: &Value) -> u8 {
    match step["mode"].as_str() {
        Some("IS") => 0,
        Some("IX") => 1,
        Some("S") => 2,
        Some("SIX") => 3,
        _ => 4,
    }
}

/// The place of `name` among those that were met, which it joins if it is new.
fn place(met: &mut Vec<String>, name: &str) -> u8 {
    let at = met.iter().position(|other| other == name).unwrap_or_else(|| {
        met.push(name.to_owned());
        met.len() - 1
    });
    u8::try_from(at).expect("few")
}

fn lock(case: &Value, met: &mut Vec<String>, name: &str) -> u8 {
    let of =
        |wanted: &str| LOCKS.iter().position(|lock| *lock == wanted).and_then(|at| u8::try_from(at).ok()).unwrap_or(0);
    let says = &case["locks"][name];
    match place(met, name) {
        _ if says["permits"].is_u64() => of("pool/1"),
        0 if says["rank"].is_u64() => of("q/1"),
        n if says["rank"].is_u64() => of("r/1") + n % 2,
        n if name.contains('/') => of("t") + n % 3,
        n => n,
    }
}

/// One step of a case.
fn translate(case: &Value, step: &Value, owners: &mut Vec<String>, locks: &mut Vec<String>) -> Option<Step> {
    let who = place(owners, step["owner"].as_str().unwrap_or("nobody"));
    Some(match step["op"].as_str()? {
        "acquire" => {
            let wait = match step["wait_ms"].as_u64() {
                Some(0) => 0,
                Some(..1000) => 1,
                _ => 3,
            };
            let locks = vec![(lock(case, locks, step["lock"].as_str()?), mode(step))];
            Step::Ask { worker: who % 4, owner: who % 6, locks, wait, ttl: who % 2, hold: 2, reentrant: true }
        }
        "release" => Step::Release(who),
        "renew" => Step::Renew(who),
        "cancel" => Step::Cancel(who),
        "crash" => Step::Crash(who),
        "expire" => Step::Advance(6),
        "advance" => Step::Advance(if step["ms"].as_u64()? < 1_000 { 3 } else { 7 }),
        "downgrade" => Step::Poll(who),
        _ => Step::Sweep(0),
    })
}

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    for case in cases {
        let (mut owners, mut locks) = (Vec::new(), Vec::new());
        let steps = case["steps"].as_array().into_iter().flatten();
        let steps = steps.filter_map(|step| translate(case, step, &mut owners, &mut locks));
        let bytes: Vec<u8> = steps.flat_map(|step| step.encode()).collect();
        seeds.add(&format!("case-{}", case["name"].as_str().unwrap_or_default()), bytes);
    }
    let ask = |worker: u8, owner: u8, locks: &[(u8, u8)], wait| Step::Ask {
        worker,
        owner,
        locks: locks.to_vec(),
        wait,
        ttl: 0,
        hold: 0,
        reentrant: true,
    };
    let alone = |worker: u8, owner: u8, mode: u8| Step::Ask {
        worker,
        owner,
        locks: vec![(0, mode)],
        wait: 3,
        ttl: 1,
        hold: 2,
        reentrant: false,
    };
    let writer_then = |rest: Vec<Step>| [vec![ask(0, 0, &[(0, 4)], 3)], rest].concat();
    let own: [(&str, Vec<Step>); 22] = [
        (
            "readers-behind-a-writer",
            writer_then(vec![ask(1, 1, &[(0, 2)], 3), ask(2, 2, &[(0, 2)], 3), Step::Release(0)]),
        ),
        (
            "first-waiter-cancels",
            writer_then(vec![ask(1, 1, &[(0, 4)], 3), ask(2, 2, &[(0, 2)], 3), Step::Cancel(0), Step::Release(0)]),
        ),
        (
            "waiter-cancels-before-readers",
            vec![ask(0, 0, &[(0, 2)], 3), ask(1, 1, &[(0, 4)], 3), ask(2, 2, &[(0, 2)], 3), Step::Cancel(0)],
        ),
        (
            "upgrade-before-waiters",
            vec![
                ask(0, 0, &[(0, 2)], 3),
                ask(1, 1, &[(0, 2)], 3),
                ask(2, 2, &[(0, 4)], 3),
                ask(0, 0, &[(0, 4)], 3),
                Step::Release(1),
            ],
        ),
        (
            "re-entry-behind-a-waiter",
            writer_then(vec![ask(1, 1, &[(0, 4)], 3), ask(0, 0, &[(0, 4)], 3), Step::Release(0), Step::Release(0)]),
        ),
        ("no-re-entry", vec![alone(0, 0, 4), alone(0, 0, 4), alone(1, 1, 2), alone(1, 1, 2)]),
        ("hold-limit", writer_then(vec![ask(1, 1, &[(0, 4)], 3), Step::Advance(5), Step::Advance(5)])),
        (
            "waits-end",
            writer_then(vec![ask(1, 1, &[(0, 4)], 1), ask(2, 2, &[(0, 4)], 1), Step::Advance(2), Step::Advance(2)]),
        ),
        ("many-waiters", writer_then((0..6).map(|n| ask(n % 4, n % 6, &[(0, 4)], 3)).collect())),
        (
            "renewals",
            vec![
                ask(3, 0, &[(0, 4)], 3),
                ask(1, 1, &[(0, 4)], 3),
                Step::Renew(0),
                Step::Advance(3),
                Step::Renew(0),
                Step::Advance(7),
            ],
        ),
        (
            "cycle-of-three",
            vec![
                ask(0, 0, &[(0, 4)], 3),
                ask(1, 1, &[(1, 4)], 3),
                ask(2, 2, &[(2, 4)], 3),
                ask(0, 0, &[(1, 4)], 3),
                ask(1, 1, &[(2, 4)], 3),
                ask(2, 2, &[(0, 4)], 3),
            ],
        ),
        (
            "upgrades-of-two",
            vec![ask(0, 0, &[(0, 2)], 3), ask(1, 1, &[(0, 2)], 3), ask(0, 0, &[(0, 4)], 3), ask(1, 1, &[(0, 4)], 3)],
        ),
        (
            "writer-between-readers",
            vec![ask(0, 0, &[(0, 2)], 3), ask(1, 1, &[(0, 4)], 3), ask(2, 2, &[(0, 2)], 3), Step::Release(0)],
        ),
        (
            "dead-worker",
            vec![ask(0, 0, &[(0, 4)], 3), ask(1, 1, &[(0, 4)], 3), Step::Crash(0), Step::Advance(6), Step::Advance(6)],
        ),
        (
            "stalled-worker",
            vec![ask(0, 0, &[(0, 4)], 3), Step::Stall(0), ask(1, 1, &[(0, 4)], 3), Step::Advance(5), Step::Resume(0)],
        ),
        ("conflicts", vec![Step::Conflicts(3), ask(0, 0, &[(0, 4)], 3), Step::Conflicts(2), Step::Release(0)]),
        (
            "failing-release",
            vec![
                ask(0, 0, &[(0, 4)], 3),
                Step::Failures(7),
                Step::Release(0),
                Step::Advance(2),
                ask(1, 1, &[(0, 4)], 3),
            ],
        ),
        ("failing-ask", vec![Step::Failures(8), ask(0, 0, &[(0, 4), (1, 4)], 3), Step::Advance(4)]),
        ("tree", vec![ask(0, 0, &[(6, 4)], 3), ask(1, 1, &[(5, 2)], 3), ask(2, 2, &[(4, 0)], 3), Step::Release(0)]),
        ("permits", vec![ask(0, 0, &[(3, 4)], 3), ask(1, 1, &[(3, 2)], 3), ask(2, 2, &[(3, 4)], 3), Step::Release(0)]),
        ("order", vec![ask(0, 0, &[(7, 4)], 3), ask(0, 0, &[(9, 4)], 3), ask(1, 1, &[(9, 4), (7, 4), (8, 2)], 3)]),
        ("clock-back", vec![ask(0, 0, &[(0, 4)], 3), Step::ClockBack(100), Step::Release(0), ask(1, 1, &[(0, 4)], 3)]),
    ];
    for (name, steps) in own {
        seeds.add(&format!("own-{name}"), steps.iter().flat_map(Step::encode).collect::<Vec<u8>>());
    }
    seeds
}
