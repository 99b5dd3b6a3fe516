//! Stored records: what the backend itself writes while the conformance cases are played, and what somebody broke of it.

use interlock::backend::local::encode;
use interlock_core::store::LockBucket;
use interlock_fuzz::host::Bench;
use interlock_fuzz::leases::{ByteStore, play};
use interlock_fuzz::records::{Input, LOCKS, OWNERS, Worker, kind};
use serde_json::Value;

use crate::Seeds;

/// The place of `name` among those that were met, which it joins if it is new.
fn place(met: &mut Vec<String>, name: &str) -> usize {
    met.iter().position(|other| other == name).unwrap_or_else(|| {
        met.push(name.to_owned());
        met.len() - 1
    })
}

/// A case in the steps of the target: two bytes each.
fn steps(case: &Value) -> Vec<u8> {
    let (mut owners, mut locks) = (Vec::new(), Vec::new());
    let mut bytes = Vec::new();
    for step in case["steps"].as_array().into_iter().flatten() {
        let owner = place(&mut owners, step["owner"].as_str().unwrap_or_default()) % OWNERS.len();
        let lock = place(&mut locks, step["lock"].as_str().unwrap_or_default()) % LOCKS.len();
        let mode = ["IS", "IX", "S", "SIX"].iter().position(|mode| step["mode"] == **mode).unwrap_or(4);
        let (what, how) = match step["op"].as_str().unwrap_or_default() {
            "acquire" if step["wait_ms"] == 0 => (12 * mode, lock | owner << 3),
            "acquire" => (12 * mode + 2, lock | owner << 3),
            "release" => (5, owner),
            "cancel" => (6, owner),
            "renew" => (8, owner),
            "expire" | "advance" => (11, 3),
            "crash" => (11, 4),
            _ => (10, 0),
        };
        bytes.extend([what, how].map(|number| u8::try_from(number).expect("small")));
    }
    bytes
}

/// The largest records of each kind that these steps leave behind, in any of their prefixes.
fn played(steps: &[u8]) -> [Vec<u8>; 3] {
    let host = Bench::with_shared(|_| None);
    let mut worker = Worker::open(&host);
    let mut largest = [Vec::new(), Vec::new(), Vec::new()];
    for step in steps.chunks_exact(2) {
        worker.step(step[0], step[1]);
        for (key, value) in host.written() {
            if let Some(at) = "los".find(kind(&key))
                && value.len() > largest[at].len()
            {
                largest[at] = value;
            }
        }
    }
    largest
}

/// What an authority remembers after these steps.
fn remembered(steps: &[u8]) -> Vec<u8> {
    let store = ByteStore::new(Input { locks: &[], owners: &[], sessions: &[], leases: &[], steps });
    play(&store);
    store.leases()
}

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    let mut bases = Vec::new();
    for case in cases {
        let steps = steps(case);
        let [locks, owners, sessions] = played(&steps);
        // Cases of equally large records hold much the same.
        let sizes = (locks.len(), owners.len());
        if bases.iter().any(|(other, _, _)| *other == sizes) {
            continue;
        }
        let steps = &steps[..steps.len().min(32)];
        let leases = remembered(steps);
        let whole = Input { locks: &locks, owners: &owners, sessions: &sessions, leases: &leases, steps };
        seeds.add(&format!("case-{}", case["name"].as_str().unwrap_or_default()), whole.bytes());
        bases.push((sizes, [locks, owners, sessions], steps.to_vec()));
    }
    let steps = [9, 0, 2, 1, 2, 9, 10, 0, 11, 3, 7, 0, 8, 0, 5, 0, 10, 1];
    for (_, records, _) in bases.iter().take(6) {
        broken(&mut seeds, records, &steps);
    }
    for n in 0..6 {
        let mut leases = remembered(&[10, 0, 2, n, 3, 4 + n, 2, 1 << 5 | n, 4, n, 7, n, 11, 2]);
        seeds.add("leases", Input { locks: &[], owners: &[], sessions: &[], leases: &leases, steps: &steps }.bytes());
        let at = leases.len().min(usize::from(n) * 7 + 3) - 1;
        leases[at] ^= 0x11;
        seeds.add("leases", Input { locks: &[], owners: &[], sessions: &[], leases: &leases, steps: &steps }.bytes());
    }
    seeds.add("nothing", Input { locks: &[], owners: &[], sessions: &[], leases: &[], steps: &steps }.bytes());
    seeds.add("nothing", Vec::new());
    let format = encode(&LockBucket::default()).expect("a record")[0];
    for (stem, bytes) in [
        ("another-format", &[format ^ 3, 0, 0][..]),
        ("only-the-format", &[format]),
        ("empty-bucket", &[format, 0, 0]),
        ("a-billion-entries", &[format, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ("highest-fence", &[format, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0]),
        ("number-too-long", &[format, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0]),
        ("number-of-two-spellings", &[format, 0x80, 0, 0]),
    ] {
        seeds.add(stem, Input { locks: bytes, owners: &[], sessions: &[], leases: &[], steps: &steps }.bytes());
        seeds.add(stem, Input { locks: &[], owners: bytes, sessions: &[], leases: &[], steps: &steps }.bytes());
        seeds.add(stem, Input { locks: &[], owners: &[], sessions: &[], leases: bytes, steps: &steps }.bytes());
        seeds.add(stem, Input { locks: &[], owners: &[], sessions: bytes, leases: &[], steps: &steps }.bytes());
    }
    seeds
}

/// Records that were cut, grew, or have a bit turned; and ones of another kind.
fn broken(seeds: &mut Seeds, [locks, owners, sessions]: &[Vec<u8>; 3], steps: &[u8]) {
    let whole =
        |locks: &[u8], owners: &[u8], sessions: &[u8]| Input { locks, owners, sessions, leases: &[], steps }.bytes();
    seeds.add("swapped", whole(owners, locks, sessions));
    seeds.add("swapped", whole(sessions, sessions, locks));
    for share in [3, 2] {
        seeds.add("cut", whole(&locks[..locks.len() / share], owners, sessions));
        seeds.add("cut", whole(locks, &owners[..owners.len() / share], sessions));
        seeds.add("cut", whole(locks, owners, &sessions[..sessions.len() / share]));
    }
    seeds.add("longer", whole(&[locks.as_slice(), &[0]].concat(), owners, sessions));
    let mut turned = |at: usize, bit: u8| {
        let turn = |record: &[u8]| {
            let mut record = record.to_vec();
            if let Some(byte) = record.get_mut(at) {
                *byte ^= bit;
            }
            record
        };
        seeds.add("turned", whole(&turn(locks), owners, sessions));
        seeds.add("turned", whole(locks, &turn(owners), sessions));
        seeds.add("turned", whole(locks, owners, &turn(sessions)));
    };
    turned(2, 0x40);
    turned(9, 0x80);
    turned(locks.len() / 2, 0x01);
    turned(locks.len() - 2, 0x80);
}
