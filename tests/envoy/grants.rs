//! Requests that get their locks: at once, after a wait, again, together.
