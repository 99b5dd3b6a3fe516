//! The rules of the contract, one readable schedule each. Every step is held against all invariants by the harness.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "../common/mod.rs"]
mod common;
mod deadlocks;
mod interference;
mod order;
mod queues;
mod requests;
mod silence;
mod time;

use common::rules;
use interlock_core::{Class, Duration, Rank, Rules};

const MICRO: Duration = Duration::from_micros(1);

fn classes(list: &[(&str, Class)]) -> Rules {
    let mut rules = rules();
    for (name, class) in list {
        rules.classes.insert((*name).into(), *class);
    }
    rules
}

fn ranked(rank: u32) -> Class {
    Class { rank: Some(Rank(rank)), ..Class::default() }
}

fn tree() -> Class {
    Class { hierarchy: true, ..Class::default() }
}
