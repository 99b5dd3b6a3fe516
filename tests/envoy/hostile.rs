//! Annotations that no honest client sends: a clear answer each, no trap, no hang.
