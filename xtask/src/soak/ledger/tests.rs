use super::*;

/// A ledger on a clock of milliseconds.
struct Book {
    ledger: Ledger,
    zero: Instant,
}

impl Book {
    fn new() -> Self {
        Self { ledger: Ledger::default().permits("pool", 2).hierarchy("stock"), zero: Instant::now() }
    }

    fn at(&self, ms: u64) -> Instant {
        self.zero + Duration::from_millis(ms)
    }

    fn enter(&mut self, id: u64, owner: &str, lock: &str, fence: u64, mode: Mode, ms: u64) {
        self.ledger.sent(id, owner, "a request");
        let grant = Grant { lock: lock.to_owned(), fence, mode };
        self.ledger.entered(id, vec![grant], self.at(ms));
    }

    fn leave(&mut self, id: u64, ms: u64, verdict: Verdict) {
        self.ledger.left(id, verdict == Verdict::Upstream, self.at(ms));
        self.ledger.ended(id, verdict, self.at(ms));
    }

    fn found(&self) -> u64 {
        self.ledger.violations().count
    }
}

#[test]
fn one_after_the_other_is_right() {
    let mut book = Book::new();
    for n in 0..10 {
        book.enter(n, &n.to_string(), "a/1", n + 1, Exclusive, n * 10);
        book.leave(n, n * 10 + 9, Verdict::Upstream);
    }
    assert_eq!(book.found(), 0);
    assert_eq!(book.ledger.tally().whole, 10);
    assert!(book.ledger.locks["a/1"].done.len() <= 2, "what can't matter any more is forgotten");
    assert!(book.ledger.requests.is_empty());
}

#[test]
fn an_overlap_is_a_violation_but_not_with_what_had_been_cut_before() {
    let mut book = Book::new();
    book.enter(1, "x", "a/1", 1, Exclusive, 0);
    book.enter(2, "y", "a/1", 2, Shared, 10);
    book.leave(2, 20, Verdict::Upstream);
    assert_eq!(book.found(), 0, "nothing is known of the first yet");
    book.leave(1, 15, Verdict::Upstream);
    assert_eq!(book.found(), 1);

    let mut book = Book::new();
    book.enter(1, "x", "a/1", 1, Exclusive, 0);
    book.enter(2, "y", "a/1", 2, Shared, 10);
    book.leave(2, 20, Verdict::Upstream);
    let cut = Verdict::Cut(book.at(8));
    book.leave(1, 15, cut);
    assert_eq!((book.found(), book.ledger.tally().excused), (0, 1));

    let mut book = Book::new();
    book.enter(1, "x", "a/1", 1, Exclusive, 0);
    book.enter(2, "y", "a/1", 2, Shared, 10);
    book.leave(2, 20, Verdict::Upstream);
    let cut = Verdict::Cut(book.at(12));
    book.leave(1, 15, cut);
    assert_eq!(book.found(), 1, "the caller had not left yet");
}

#[test]
fn one_owner_and_readers_may_be_inside_together() {
    let mut book = Book::new();
    book.enter(1, "x", "a/1", 1, Exclusive, 0);
    book.enter(2, "x", "a/1", 1, Shared, 5);
    book.enter(3, "y", "a/2", 7, Shared, 5);
    book.enter(4, "z", "a/2", 6, Shared, 6);
    for id in 1..=4 {
        book.leave(id, 10 + id, Verdict::Upstream);
    }
    assert_eq!(book.found(), 0);
}

#[test]
fn fences_must_rise_also_over_what_is_forgotten() {
    let mut book = Book::new();
    for (id, fence) in [(1, 5), (2, 6), (3, 4)] {
        book.enter(id, &id.to_string(), "a/1", fence, Exclusive, id * 100);
        book.leave(id, id * 100 + 1, Verdict::Upstream);
    }
    assert_eq!(book.found(), 2, "below both: one is remembered, one forgotten");
    let mut book = Book::new();
    book.enter(1, "x", "a/1", 5, Shared, 0);
    book.enter(2, "y", "a/1", 5, Shared, 0);
    book.leave(1, 1, Verdict::Upstream);
    book.leave(2, 1, Verdict::Upstream);
    assert_eq!(book.found(), 1, "no fence is given twice");
}

#[test]
fn permits_are_counted() {
    let mut book = Book::new();
    for id in 1..=3 {
        book.enter(id, "x", "pool/1", id, Exclusive, id);
    }
    book.leave(1, 10, Verdict::Upstream);
    book.leave(2, 11, Verdict::Upstream);
    assert_eq!(book.found(), 0);
    book.leave(3, 12, Verdict::Upstream);
    assert_eq!(book.found(), 1);
}

#[test]
fn a_lock_conflicts_with_what_is_below_it() {
    let mut book = Book::new();
    book.enter(1, "x", "stock/a", 1, Exclusive, 0);
    book.enter(2, "y", "stock/a/b", 1, Shared, 5);
    book.enter(3, "z", "stock/c/b", 1, Exclusive, 5);
    for id in 1..=3 {
        book.leave(id, 10, Verdict::Upstream);
    }
    assert_eq!(book.found(), 1, "{:?}", book.ledger.violations());
}

#[test]
fn a_refused_request_has_no_business_upstream() {
    let mut book = Book::new();
    book.ledger.sent(1, "x", "a request");
    book.ledger.ended(1, Verdict::Refused, book.at(1));
    let now = book.at(2);
    book.ledger.entered(1, Vec::new(), now);
    book.enter(2, "x", "a/1", 1, Exclusive, 0);
    book.leave(2, 1, Verdict::Refused);
    assert_eq!(book.found(), 2);
}
