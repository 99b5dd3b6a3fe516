//! What a run leaves behind: a digest always, and the lines of it where somebody wants to read them.

/// The trace of one schedule.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    digest: u64,
    lines: Option<Vec<String>>,
}

impl Trace {
    /// A trace without lines, or with them.
    pub fn new(with_lines: bool) -> Self {
        Trace { digest: 0xcbf2_9ce4_8422_2325, lines: with_lines.then(Vec::new) }
    }

    /// Something happened: what, and to whom.
    pub fn mark(&mut self, what: u64, whom: usize) {
        let word = what << 32 ^ u64::try_from(whom).unwrap_or(u64::MAX);
        self.digest = (self.digest.rotate_left(5) ^ word).wrapping_mul(0x0100_0000_01b3);
    }

    /// Something happened that is worth a line.
    pub fn line(&mut self, what: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.lines {
            lines.push(what());
        }
    }

    /// A number that another run has only if the same happened in it.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The lines.
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}
