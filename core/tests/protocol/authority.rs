//! The authority's side of a world: the shipped functions, called as a worker calls them.
//!
//! Every operation runs on a desk of its own, and is watched. What must not be here: what is right (see [`super::watch`]).

use std::cell::RefCell;
use std::sync::Arc;

use interlock_core::lease::{self, Answer, Deleted, Granted, PutAnswer, Renewed};
use interlock_core::{Cause, Census, Effects, LeaseId, Request, Rules, Scene, Store, Table, Time, Want};

use super::watch::{self, Sight, Work};
use super::world::{Authority, Body, Desk, Laws, Message, Reply, Shelf, Stream, TICK, Told, World};

/// An authority that has just started.
pub fn start(rules: &Rules, now: Time, wall: u64) -> Authority {
    let mut authority = Authority { shelf: Shelf::default(), table: Arc::new(Table::new()), streams: Vec::new() };
    authority.beat(rules, now, wall);
    authority
}

impl Authority {
    /// Runs one operation on the records.
    pub fn on<T>(
        &mut self,
        rules: &Rules,
        now: Time,
        wall: u64,
        act: impl FnOnce(&mut Table, &Scene<'_, Desk>) -> T,
    ) -> (T, Effects) {
        let desk = Desk(RefCell::new(self.shelf.clone()));
        let table = Arc::make_mut(&mut self.table);
        let answer = act(table, &Scene { store: &desk, rules, now, unix_micros: wall });
        let effects = table.take_effects();
        self.shelf = desk.0.into_inner();
        (answer, effects)
    }

    pub fn beat(&mut self, rules: &Rules, now: Time, wall: u64) {
        let (joined, _) = self.on(rules, now, wall, |table, scene| table.beat(scene, 0));
        joined.unwrap();
    }
}

/// Goes through all records.
fn keep_house(table: &mut Table, scene: &Scene<'_, Desk>) {
    let mut census = Census::default();
    for bucket in 0..scene.store.buckets() {
        lease::authority::sweep(table, scene, bucket).unwrap();
        table.sweep(scene, bucket, &mut census).unwrap();
    }
    table.publish_census(scene, &census).unwrap();
}

impl World {
    /// Runs one operation of the authority, and watches it.
    fn work<T>(
        &mut self,
        laws: &Laws,
        work: Work,
        sights: &mut Vec<Sight>,
        act: impl FnOnce(&mut Table, &Scene<'_, Desk>) -> T,
    ) -> T {
        let before = self.authority.shelf.clone();
        let (answer, effects) = self.authority.on(&laws.rules, self.now, self.wall, act);
        for wake in &effects.wakes {
            let streams = self.authority.streams.iter_mut();
            let woken = streams.filter(|stream| stream.parked.lease() == wake.lease && stream.parked.drives());
            woken.for_each(|stream| stream.woken = true);
        }
        watch::worked(self, laws, &before, work, sights);
        answer
    }

    fn send(&mut self, proxy: usize, life: u8, call: lease::CallId, body: Body) {
        self.net.push(Message { proxy, life, call, body: Arc::new(body) });
    }

    /// What to do with the answer to a request for a lease.
    fn settle(&mut self, call: (usize, u8, lease::CallId), answer: Answer, sights: &mut Vec<Sight>) {
        let (proxy, life, call) = call;
        let body = match answer {
            Answer::Parked(parked) => {
                sights.extend((!parked.drives()).then_some(Sight::Watched));
                self.authority.streams.push(Stream { proxy, life, call, parked, woken: false });
                return;
            }
            Answer::Granted { granted, new } => {
                sights.extend((!new).then_some(Sight::FoundAgain));
                Body::Answer(Box::new(told(*granted)))
            }
            Answer::Refused(refusal) => match refusal.cause {
                Cause::Grace { left } => Body::Unable(left),
                cause => Body::Answer(Box::new(PutAnswer::Refused(cause.slug()))),
            },
            Answer::Over(_) => Body::Answer(Box::new(PutAnswer::Over { fresh: LeaseId(0), why: "lease-lost" })),
            Answer::Taken => {
                self.memory.fault.get_or_insert("an identity is taken for another's");
                return;
            }
        };
        self.send(proxy, life, call, body);
    }
}

fn told(granted: Granted) -> Reply {
    let grant =
        Told { fences: granted.grants.iter().map(|grant| grant.fence).collect(), receipt: Arc::new(granted.receipt) };
    PutAnswer::Granted { ttl: granted.ttl, waited: granted.waited, grant }
}

/// Takes a message in.
pub fn take(world: &mut World, laws: &Laws, message: &Message, sights: &mut Vec<Sight>) {
    let Message { proxy, life, call, ref body } = *message;
    match &**body {
        Body::Put { lease, request, wait } => {
            let want = |(lock, mode): &(usize, _)| {
                let name = laws.names[*lock].clone();
                Want { name, mode: *mode, wait: *wait, ttl: laws.ttl, hold: laws.hold }
            };
            let wants = laws.scripts[proxy][*request].iter().map(want).collect();
            let request = Request::new(*lease, laws.owners[proxy].clone(), world.now, wants, &laws.rules.classes);
            let answer = world.work(laws, Work::Grants(*lease), sights, |table, scene| {
                lease::authority::put(table, scene, request, None).unwrap()
            });
            let ended = matches!(answer, Answer::Over(_)) && world.memory.ended.iter().any(|(ended, _)| ended == lease);
            sights.extend(ended.then_some(Sight::Overtaken));
            world.settle((proxy, life, call), answer, sights);
        }
        Body::Renew { leases } => {
            let answers = leases.iter().map(|(lease, receipt)| {
                let answer = world.work(laws, Work::Renews(*lease), sights, |table, scene| {
                    lease::authority::renew(table, scene, *lease, None, Some(receipt)).unwrap()
                });
                watch::renewed(world, laws, *lease, answer, sights);
                (*lease, expires_in(answer))
            });
            let body = Body::Renewed(answers.collect());
            world.send(proxy, life, call, body);
        }
        Body::Delete { lease } => {
            let again = world.memory.ended.iter().any(|(ended, _)| ended == lease);
            let deleted = world.work(laws, Work::Ends(*lease), sights, |table, scene| {
                lease::authority::delete(table, scene, *lease).unwrap()
            });
            if again {
                sights.extend((deleted == Deleted::Released).then_some(Sight::ReleasedAgain));
            } else {
                world.memory.ended.push((*lease, world.now));
            }
            world.send(proxy, life, call, Body::Deleted);
        }
        Body::Answer(_) | Body::Unable(_) | Body::Renewed(_) | Body::Deleted => {}
    }
}

fn expires_in(answer: Renewed) -> Option<interlock_core::Duration> {
    match answer {
        Renewed::Renewed { expires_in } => Some(expires_in),
        Renewed::Lost => None,
    }
}

/// A waiter looks for itself.
pub fn poll(world: &mut World, laws: &Laws, at: usize, sights: &mut Vec<Sight>) {
    let Stream { proxy, life, call, parked, .. } = world.authority.streams.remove(at);
    let work = Work::Grants(parked.lease());
    let answer = world.work(laws, work, sights, |table, scene| lease::authority::poll(table, scene, parked).unwrap());
    sights.extend(matches!(answer, Answer::Granted { .. }).then_some(Sight::GrantedLater));
    world.settle((proxy, life, call), answer, sights);
}

/// A waiter's stream has gone.
pub fn leave(world: &mut World, laws: &Laws, at: usize, sights: &mut Vec<Sight>) {
    let Stream { parked, .. } = world.authority.streams.remove(at);
    sights.push(Sight::Left);
    let work = Work::Ends(parked.lease());
    world.work(laws, work, sights, |table, scene| lease::authority::leave(table, scene, parked));
}

pub fn sweep(world: &mut World, laws: &Laws, sights: &mut Vec<Sight>) {
    world.work(laws, Work::KeepsHouse, sights, keep_house);
}

/// Lets time pass at an authority that nobody talks to, until everything must have ended; then keeps house.
pub fn outlive(world: &World, laws: &Laws) -> Authority {
    let mut authority = world.authority.clone();
    let (mut now, mut wall) = (world.now, world.wall);
    for _ in 0..10 {
        now = now + TICK;
        wall += TICK.as_micros() as u64;
        authority.beat(&laws.rules, now, wall);
        drop(authority.on(&laws.rules, now, wall, keep_house));
    }
    authority
}

/// The receipt's lease as the authority would tell of it.
pub fn get(world: &World, laws: &Laws, lease: LeaseId) -> Option<Granted> {
    let mut authority = world.authority.clone();
    let got = authority
        .on(&laws.rules, world.now, world.wall, |table, scene| lease::authority::get(table, scene, lease).unwrap());
    got.0
}
