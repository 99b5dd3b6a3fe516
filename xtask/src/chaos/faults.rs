//! What goes wrong, drawn from a seed, and how it is made to.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use fastrand::Rng;
use interlock_testkit::Direction;

use super::world::{TTL, Way, World};

/// A fault. Nodes are the authority (none) or a sidecar; ways are by their number.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// kill -9, and another process in its place after a while.
    Kill(Option<usize>, Duration),
    /// SIGSTOP, and SIGCONT after a while.
    Freeze(Option<usize>, Duration),
    /// A worker's VM traps.
    Trap(Option<usize>),
    /// A new policy: all VMs are configured anew.
    Reconfigure(Option<usize>),
    /// The wall clock is off by so many microseconds from now on.
    Clock(i64),
    /// Nothing gets through in either direction.
    Partition(usize, Duration),
    /// Nothing gets through in one direction.
    OneWay(usize, Direction, Duration),
    /// Everything in one direction is late.
    Delay(usize, Direction, Duration, Duration),
    /// All connections break off.
    Cut(usize),
    /// So many requests come a second time, so much later.
    Double(u64, Duration),
}

impl Fault {
    /// Draws one.
    pub fn draw(rng: &mut Rng, sidecars: usize) -> Self {
        let mut millis = |range: std::ops::Range<u64>| Duration::from_millis(rng.u64(range));
        // Some shorter than a lease, some longer.
        let (short, span) = (millis(10..150), millis(50..2 * u64::try_from(TTL.as_millis()).unwrap_or(1000)));
        let (dead, late) = (millis(0..500), millis(100..600));
        let node = (rng.usize(..=sidecars)).checked_sub(1);
        let way = rng.usize(..=sidecars);
        let direction = if rng.bool() { Direction::Up } else { Direction::Down };
        match rng.u32(..100) {
            0..4 => Fault::Kill(None, dead),
            4..10 if sidecars > 0 => Fault::Kill(Some(rng.usize(..sidecars)), dead),
            10..16 => Fault::Freeze(None, span),
            16..24 if sidecars > 0 => Fault::Freeze(Some(rng.usize(..sidecars)), span),
            24..32 => Fault::Trap(node),
            32..37 => Fault::Reconfigure(node),
            37..44 => Fault::Clock([-30_000_000, -400_000, 400_000, 0][rng.usize(..4)]),
            44..54 => Fault::Partition(way, span),
            54..70 => Fault::OneWay(way, direction, span),
            70..82 => Fault::Delay(way, direction, short, span),
            82..90 => Fault::Cut(way),
            _ => Fault::Double(rng.u64(1..30), late),
        }
    }

    /// What kind it is, for the report.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Kill(None, _) => "authority killed (-9) and restarted",
            Fault::Kill(Some(_), _) => "sidecar killed (-9) and restarted",
            Fault::Freeze(None, _) => "authority stopped (SIGSTOP)",
            Fault::Freeze(Some(_), _) => "sidecar stopped (SIGSTOP)",
            Fault::Trap(_) => "worker VM trapped",
            Fault::Reconfigure(_) => "policy replaced",
            Fault::Clock(_) => "wall clock stepped",
            Fault::Partition(..) => "partition, both ways",
            Fault::OneWay(_, Direction::Up, _) => "partition, requests only",
            Fault::OneWay(_, Direction::Down, _) => "partition, answers only",
            Fault::Delay(_, Direction::Up, ..) => "late requests",
            Fault::Delay(_, Direction::Down, ..) => "late answers",
            Fault::Cut(_) => "connections broken off",
            Fault::Double(..) => "requests that come twice",
        }
    }

    /// Makes it happen, and returns when it is over.
    pub async fn inflict(self, world: &World) -> Result<()> {
        let node = |number: Option<usize>| match number {
            None => &world.authority,
            Some(number) => &world.sidecars[number],
        };
        match self {
            Fault::Kill(None, dead) => world.restart_authority(dead).await,
            Fault::Kill(sidecar, dead) => node(sidecar).kill(dead).await,
            Fault::Freeze(number, span) => node(number).freeze(span).await,
            Fault::Trap(number) => node(number).trap().await,
            Fault::Reconfigure(number) => node(number).reconfigure().await,
            Fault::Clock(micros) => {
                world.authority.step_clock(micros).await;
                Ok(())
            }
            Fault::Partition(way, span) => {
                let both = [Direction::Up, Direction::Down];
                on(&world.ways[way], span, |way| both.iter().for_each(|d| way.link.hold(*d))).await
            }
            Fault::OneWay(way, direction, span) => on(&world.ways[way], span, |way| way.link.hold(direction)).await,
            Fault::Delay(way, direction, by, span) => {
                on(&world.ways[way], span, |way| way.link.delay(direction, by)).await
            }
            Fault::Cut(way) => on(&world.ways[way], Duration::ZERO, |way| way.link.cut()).await,
            Fault::Double(count, later) => {
                world.relay.double(count, later);
                Ok(())
            }
        }
    }

    /// What it keeps busy: two faults of one and the same place would undo each other.
    pub fn place(&self) -> Place {
        match *self {
            Fault::Kill(node, _) | Fault::Freeze(node, _) | Fault::Trap(node) | Fault::Reconfigure(node) => {
                Place::Node(node)
            }
            Fault::Clock(_) => Place::Node(None),
            Fault::Partition(way, _) | Fault::OneWay(way, ..) | Fault::Delay(way, ..) | Fault::Cut(way) => {
                Place::Way(way)
            }
            Fault::Double(..) => Place::Relay,
        }
    }
}

/// Where a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Node(Option<usize>),
    Way(usize),
    Relay,
}

async fn on(way: &Arc<Way>, span: Duration, begin: impl FnOnce(&Way)) -> Result<()> {
    let _trouble = way.troubles.begin();
    begin(way);
    tokio::time::sleep(span).await;
    way.link.heal();
    Ok(())
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {self:?}", self.kind())
    }
}
