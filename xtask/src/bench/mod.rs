//! `cargo xtask bench`: what a lock costs, side by side with what others do instead, in one run on one machine.
//!
//! Everything is measured in turns, so that what else the machine does hits all alike, and told as ratios with their spread: see
//! docs/performance.md. What can't be brought is skipped, and said to be.

mod chart;
mod crowds;
mod footprint;
mod handover;
mod load;
mod machine;
mod nginx;
mod overhead;
mod page;
mod pairs;
mod proxies;
mod report;
mod searches;
mod servers;
mod services;
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use interlock_testkit::tools;
use serde_json::json;

use crate::{run, wasm};
use pairs::Pace;
use report::{Finding, Findings};

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Answer only this question; may be given several times
    #[arg(long, value_name = "QUESTION")]
    only: Vec<Question>,
    /// Take less than five minutes, for numbers that scatter more
    #[arg(long)]
    quick: bool,
    /// How often each thing is measured, instead of 12 times (3 with --quick)
    #[arg(long)]
    rounds: Option<usize>,
    /// How long each measurement takes, in milliseconds, instead of 800 (400 with --quick)
    #[arg(long)]
    millis: Option<u64>,
    /// Write all numbers into this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the tables into this page (Markdown): between the lines that mark where they go, or all of it where it has none
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw a chart a question (SVG) into this folder
    #[arg(long, value_name = "FOLDER", default_value = "dist/bench")]
    charts: PathBuf,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

/// What is asked. In the order it is asked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Question {
    /// What a local lock adds to a request, beside a filter that does nothing
    Cost,
    /// Several locks, by rule and by header, and locks that many want
    Locks,
    /// Two workers, which share the lock table
    Workers,
    /// An authority's lock, beside bare calls, ext_authz, and Lua with Webdis and Redis
    Remote,
    /// A lock in nginx, each proxy beside itself without a lock
    Nginx,
    /// Lock services without a proxy: the lease API, Redis, etcd
    Services,
    /// One lock that many want: from a release to the next grant, and how evenly they wait
    Handover,
    /// The lock table alone: what a search for cycles costs by its chain and by the table's size, and other parts
    Searches,
    /// Start-up, sizes and memory: of a VM, a lock, a waiter
    Footprint,
}

impl Question {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Whether it is this program that asks, and not h2load.
    fn has_clients(self) -> bool {
        matches!(self, Question::Services | Question::Handover | Question::Searches)
    }

    async fn ask(self, pace: Pace) -> Result<Finding> {
        match self {
            Question::Cost => overhead::cost(pace).await,
            Question::Locks => overhead::locks(pace).await,
            Question::Workers => overhead::workers(pace).await,
            Question::Remote => overhead::remote(pace).await,
            Question::Nginx => nginx::beside(pace).await,
            Question::Services => crowds::services(pace).await,
            Question::Handover => handover::hand_over(pace).await,
            Question::Searches => searches::searches(pace).await,
            Question::Footprint => footprint::footprint(pace).await,
        }
    }
}

pub fn run(args: &BenchArgs) -> Result<()> {
    // Clients of our own must not be slower than what they ask.
    if cfg!(debug_assertions) && args.questions().any(Question::has_clients) {
        let mut cargo = tools::cargo();
        cargo.args(["run", "--quiet", "--profile", "bench-clients", "--package", "xtask", "--"]);
        return tools::run(cargo.args(std::env::args_os().skip(1)));
    }
    if !args.no_build {
        if std::env::var_os("INTERLOCK_WASM").is_none() {
            wasm::shipped()?;
        }
        wasm::make_bench_filters()?;
    }
    let plugin = tools::plugin_wasm()?;
    let machine = machine::described();
    let pace = args.pace();
    println!(
        "{machine}; {} rounds of {} ms; Envoy: {}\n",
        pace.rounds,
        pace.time.as_millis(),
        tools::envoy()?.display()
    );
    let start = Instant::now();
    let findings = run::block_on(args.ask(pace))?;
    let mut verdicts = report::verdicts(targets::TARGETS, &findings);
    // Of some questions, what they tell of.
    verdicts.retain(|verdict| args.only.is_empty() || verdict.found.is_some());
    let took = start.elapsed();
    println!("{}", report::judged(&verdicts));
    println!("took {:.0} s", took.as_secs_f32());
    if let Some(file) = &args.markdown {
        let run = page::Run { machine: &machine, pace, took, options: args.options() };
        page::write(file, &page::measured(&run, &findings, &verdicts))?;
    }
    if let Some(file) = &args.json {
        let all = json!({
            "machine": machine,
            "envoy": tools::ENVOY_VERSION,
            "plugin_bytes": fs::metadata(&plugin)?.len(),
            "rounds": pace.rounds,
            "millis": pace.time.as_millis() as u64,
            "findings": findings.0.values().collect::<Vec<_>>(),
            "targets": verdicts,
        });
        fs::write(file, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

impl BenchArgs {
    fn pace(&self) -> Pace {
        let (rounds, millis) = if self.quick { (3, 400) } else { (12, 800) };
        Pace {
            rounds: self.rounds.unwrap_or(rounds).max(1),
            warm_up: Duration::from_millis(150),
            time: Duration::from_millis(self.millis.unwrap_or(millis).max(50)),
        }
    }

    /// As they were given, but for where the results go.
    fn options(&self) -> String {
        let only = self.only.iter().map(|question| format!(" --only {}", question.name()));
        let mut options: String = only.collect();
        options += if self.quick { " --quick" } else { "" };
        options += &self.rounds.map(|rounds| format!(" --rounds {rounds}")).unwrap_or_default();
        options + &self.millis.map(|millis| format!(" --millis {millis}")).unwrap_or_default()
    }

    fn questions(&self) -> impl Iterator<Item = Question> {
        let wanted = |question: &Question| self.only.is_empty() || self.only.contains(question);
        Question::value_variants().iter().copied().filter(wanted)
    }

    /// Asks what is to be asked, and tells each answer at once.
    async fn ask(&self, pace: Pace) -> Result<Findings> {
        let charts = tools::root().join(&self.charts);
        let mut findings = Findings::default();
        for question in self.questions() {
            let name = question.name();
            let finding = question.ask(pace).await.or_else(|why| {
                let mut finding = Finding::new(&name, &name, &[]);
                finding.skip("all of it", why)?;
                anyhow::Ok(finding)
            });
            let finding = finding.with_context(|| format!("the question {name}"))?;
            println!("{}", finding.markdown());
            draw(&finding, &charts)?;
            findings.0.insert(name, finding);
        }
        Ok(findings)
    }
}

fn draw(finding: &Finding, charts: &Path) -> Result<()> {
    fs::create_dir_all(charts).with_context(|| format!("cannot make {}", charts.display()))?;
    let file = charts.join(format!("{}.svg", finding.question));
    chart::draw(finding, finding.charted, &file)
}
