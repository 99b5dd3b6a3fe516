//! The parts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::rc::Rc;

use interlock::annotation::parse_lock_header;
use interlock::backend::local::{decode, encode};
use interlock_core::store::{Kind, LockBucket, OwnerBucket};
use interlock_core::{Census, Duration, LockName, Outcome, Store};

use super::Case;
use super::world::{BUCKETS, World, lock, owner};

/// Locks that others hold while one is measured: one in every second bucket.
const OTHERS: usize = 512;
/// What a lock table is full of where it is swept.
const FULL: usize = 1000;

/// What a part is called, in the baseline too, and what makes it.
pub type Named = (&'static str, fn() -> Case);

/// All parts, in the order in which they are told.
pub const CASES: &[Named] = &[
    ("1 lock", || locks(true, 1)),
    ("3 locks", || locks(true, 3)),
    ("8 locks", || locks(true, 8)),
    ("1 lock, locks_per_owner: null", || locks(false, 1)),
    ("8 locks, locks_per_owner: null", || locks(false, 8)),
    ("a second lock in the declared order", in_order),
    ("a refusal of a lock against the declared order", against_the_order),
    ("a wait behind a holder, given up", || arrival(0)),
    ("a hand-over, with 16 waiters", || hand_over(16)),
    ("a wait at the end of a chain of 4", || chain(4, OTHERS)),
    ("a wait at the end of a chain of 256", || chain(256, OTHERS)),
    ("a refusal of a cycle of 4", || ring(4)),
    ("a heartbeat", heartbeat),
    ("a sweep of 1,000 locks", sweep),
    ("a sweep that ends 1,000 leases", expiry),
    ("decode and encode a bucket of 1 lock", || bucket(1)),
    ("decode and encode a bucket of 100 locks", || bucket(100)),
    ("read a lock header of 1 lock", || header("order/5c1f0e6a")),
    ("read a lock header of 8 locks", || header(EIGHT)),
];

const EIGHT: &str = r#"order/5c1f0e6a;mode=shared, order/b3d94f77;wait=2, stock/88215e9a;ttl=1.5;hold=30, a/1, a/2, a/3, "b/3", c/4;wait=0"#;

/// Those of the order class, which others do not hold.
fn names(count: usize) -> Vec<LockName> {
    (0..count).map(|n| lock(&format!("order/5c1f0e6ab3d94f77/{n}"))).collect()
}

/// A table in which others hold locks.
fn busy(limited: bool, others: usize) -> World {
    let mut world = World::new(limited);
    for n in 0..others {
        let _held = world.take(&owner(1_000_000 + n), &[lock(&format!("other/{n}"))]);
    }
    world
}

/// Acquire and release of locks that nobody else wants.
fn locks(limited: bool, count: usize) -> Case {
    let (mut world, names, me) = (busy(limited, OTHERS), names(count), owner(1));
    Case::new(move || {
        let lease = world.take(&me, &names);
        world.release(black_box(lease));
    })
}

/// The order check that lets it pass: the owner holds a lock of a lower class in another request.
fn in_order() -> Case {
    let (mut world, me) = (busy(true, OTHERS), owner(1));
    let _first = world.take(&me, &[lock("first/1")]);
    let second = [lock("second/1")];
    Case::new(move || {
        let lease = world.take(&me, &second);
        world.release(black_box(lease));
    })
}

fn against_the_order() -> Case {
    let (mut world, me) = (busy(true, OTHERS), owner(1));
    let _second = world.take(&me, &[lock("second/1")]);
    let first = [lock("first/1")];
    Case::new(move || {
        let request = world.request(&me, &first);
        refused(world.acquire(request));
    })
}

fn refused(outcome: Outcome) {
    let Outcome::Refused(refusal) = outcome else { panic!("not refused") };
    black_box(refusal);
}

/// Somebody comes to stand behind a holder and so many who wait, and goes again.
pub fn arrival(waiters: usize) -> Case {
    let (mut world, one) = (busy(true, OTHERS), names(1));
    let _held = world.take(&owner(1), &one);
    for n in 0..waiters {
        let _waits = world.wait(&owner(3 + n), &one);
    }
    let me = owner(2);
    Case::new(move || {
        let pending = world.wait(&me, &one);
        world.cancel(black_box(pending));
    })
}

/// A release, the next one's look at what it was granted, and somebody else who comes.
pub fn hand_over(waiters: usize) -> Case {
    let (mut world, one) = (busy(true, OTHERS), names(1));
    let mut holder = Some(world.take(&owner(0), &one));
    let mut line: VecDeque<_> = (1..=waiters).map(|n| world.wait(&owner(n), &one)).collect();
    let mut next = waiters;
    Case::new(move || {
        world.release(holder.take().expect("a holder"));
        let first = line.pop_front().expect("a waiter");
        let Outcome::Granted(lease) = world.poll(first) else { panic!("not granted") };
        holder = Some(lease);
        // The same owners come back, so that the records stay as long as they are.
        next = (next + 1) % (waiters + 1);
        line.push_back(world.wait(&owner(next), &one));
    })
}

/// A table with so many other locks and a chain: owner `n` holds lock `n` and waits for lock `n + 1`; the last one holds only.
fn chained(length: usize, others: usize) -> World {
    let mut world = busy(true, others);
    let name = |n: usize| lock(&format!("chain/{n}"));
    for n in 0..length {
        let _held = world.take(&owner(n), &[name(n)]);
    }
    // From the front, so that each search to get there is short.
    for n in 0..length - 1 {
        let _waits = world.wait(&owner(n), &[name(n + 1)]);
    }
    world
}

/// Who holds the first lock of a chain is waited for by nobody; one more comes and waits for it, and goes again. So many other locks are
/// held meanwhile.
pub fn chain(length: usize, others: usize) -> Case {
    let (mut world, first, me) = (chained(length, others), [lock("chain/0")], owner(99_999));
    Case::new(move || {
        let pending = world.wait(&me, &first);
        world.cancel(black_box(pending));
    })
}

/// The owner at the end of a chain asks for its first lock, and is refused with the cycle.
pub fn ring(length: usize) -> Case {
    let (mut world, first, me) = (chained(length, OTHERS), [lock("chain/0")], owner(length - 1));
    Case::new(move || {
        let request = world.request(&me, &first);
        refused(world.acquire(request));
    })
}

fn heartbeat() -> Case {
    let mut world = busy(true, 1);
    Case::new(move || world.beat())
}

/// A look at every bucket of a full table, in which nothing has ended.
fn sweep() -> Case {
    let mut world = busy(true, FULL);
    Case::new(move || swept(&mut world, FULL))
}

/// The same after the worker that held them has died: all of them have ended.
fn expiry() -> Case {
    let mut world = busy(true, FULL);
    world.now = world.now + Duration::from_secs(11);
    let records = world.store.clone();
    let world = Rc::new(RefCell::new(world));
    let again = Rc::clone(&world);
    let work = move || swept(&mut world.borrow_mut(), 0);
    let prepare = Box::new(move || again.borrow_mut().store = records.clone());
    Case { prepare: Some(prepare), ..Case::new(work) }
}

fn swept(world: &mut World, left: usize) {
    let mut census = Census::default();
    for bucket in 0..BUCKETS {
        world.on(|table, scene| table.sweep(scene, bucket, &mut census)).expect("a sweep");
    }
    assert_eq!(census.locks, left as u64);
}

/// The records of one bucket with so many locks and as many owners, from bytes and back.
fn bucket(count: usize) -> Case {
    let mut world = World::new(true);
    let crowded = |name: &&String| world.store.bucket(name) == 1;
    let of_bucket =
        |make: fn(usize) -> String| -> Vec<_> { (0..).map(make).filter(|n| crowded(&n)).take(count).collect() };
    let names = of_bucket(|n| format!("order/5c1f0e6ab3d94f77/{n}"));
    let owners = of_bucket(owner);
    for (name, owner) in names.iter().zip(&owners) {
        let _held = world.take(owner, &[lock(name)]);
    }
    let (locks, owners) = (world.store.bytes(Kind::Locks, 1), world.store.bytes(Kind::Owners, 1));
    Case::new(move || {
        let read: LockBucket = decode(black_box(&locks)).expect("a record");
        black_box(encode(&read).expect("its bytes"));
        let read: OwnerBucket = decode(black_box(&owners)).expect("a record");
        black_box(encode(&read).expect("its bytes"));
    })
}

fn header(field: &'static str) -> Case {
    Case::new(move || {
        black_box(parse_lock_header([black_box(field.as_bytes())]).expect("an annotation"));
    })
}
