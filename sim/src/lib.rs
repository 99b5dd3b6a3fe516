//! A deterministic simulator of Interlock: the code that ships, under every alternation and fault that a seed makes up.
//!
//! A seed makes a [`schedule`]; [`world`] plays it; `oracle` holds every step against the contract; what fails is made
//! short by [`shrink`]. Nothing here sleeps, reads a clock or draws a random number that is not from the seed, so that a
//! seed replays byte for byte. What must not live here: any rule about locks that the product decides by.

pub mod backend;
pub mod cli;
pub mod crew;
pub mod dice;
pub mod driver;
pub mod oracle;
pub mod port;
pub mod protocol;
pub mod report;
pub mod run;
pub mod schedule;
pub mod shrink;
pub mod state;
pub mod trace;
pub mod words;
pub mod world;
