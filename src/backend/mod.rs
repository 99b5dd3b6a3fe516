//! Where locks are kept. One module a backend; the rules about locks are the core's.

pub mod local;
#[cfg(test)]
mod tests;
