//! `enforcement: audit` and `off`: what is decided without anyone noticing, and what is not even looked at.
