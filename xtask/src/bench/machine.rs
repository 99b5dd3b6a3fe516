//! The machine as the bench uses it: which cores a proxy gets and which what is around it, what a process has used of them,
//! and standing still.
//!
//! Linux tells and does all of this. Nothing is started here.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// Who runs on which cores. A proxy that is measured has cores of its own as far as there are enough.
#[derive(Debug, Clone)]
pub struct Cores {
    /// Of the proxy that is measured.
    pub proxy: Vec<usize>,
    /// Of load, upstream and other services.
    pub rest: Vec<usize>,
}

impl Cores {
    /// For a proxy of so many workers. With no core to spare, all share all.
    pub fn of(workers: usize) -> Result<Self> {
        let mine = sched_getaffinity(Pid::from_raw(0)).context("cannot read which cores there are")?;
        let all: Vec<_> = (0..CpuSet::count()).filter(|core| mine.is_set(*core).unwrap_or(false)).collect();
        if workers >= all.len() {
            return Ok(Cores { proxy: all.clone(), rest: all });
        }
        let (proxy, rest) = all.split_at(workers);
        Ok(Cores { proxy: proxy.to_vec(), rest: rest.to_vec() })
    }
}

fn set(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    cores.iter().try_for_each(|core| set.set(*core)).context("no such core")?;
    Ok(set)
}

/// Keeps all threads of a process, and what they start later, on these cores.
pub fn pin(process: u32, cores: &[usize]) -> Result<()> {
    let set = set(cores)?;
    for task in fs::read_dir(format!("/proc/{process}/task")).context("no such process")? {
        let id = task?.file_name().to_string_lossy().parse()?;
        // A thread may have ended since the folder was read.
        let _ = sched_setaffinity(Pid::from_raw(id), &set);
    }
    Ok(())
}

/// Keeps the calling thread, and what it starts, on these cores.
pub fn pin_thread(cores: &[usize]) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &set(cores)?).context("cannot choose cores")
}

/// The CPU time that all threads of a process have used since it began, in microseconds.
pub fn cpu_micros(process: u32) -> Result<f64> {
    let clock = clock_getcpuclockid(pid(process)?).context("no such process")?;
    let time = clock.now().context("cannot read a process's clock")?;
    Ok(time.tv_sec() as f64 * 1e6 + time.tv_nsec() as f64 / 1e3)
}

/// Stops a process where it stands, so that it takes nothing of what is measured meanwhile.
pub fn freeze(process: u32) -> Result<()> {
    kill(pid(process)?, Signal::SIGSTOP).context("cannot stop a process")
}

/// Lets it go on.
pub fn thaw(process: u32) -> Result<()> {
    kill(pid(process)?, Signal::SIGCONT).context("cannot let a process go on")
}

/// How long these cores have been busy and idle since the machine began, in ticks: (busy, all).
pub fn ticks(cores: &[usize]) -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat")?;
    let (mut busy, mut all) = (0, 0);
    for core in cores {
        let name = format!("cpu{core} ");
        let line = stat.lines().find_map(|line| line.strip_prefix(&name)).context("/proc/stat lacks a core")?;
        let times: Vec<u64> = line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>()?;
        ensure!(times.len() == 8, "/proc/stat is not as it should be");
        let sum: u64 = times.iter().sum();
        all += sum;
        busy += sum - times[3] - times[4];
    }
    Ok((busy, all))
}

/// The machine in one line.
pub fn described() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.split(['-', '\n']).next().unwrap_or("?");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    format!("{cores} cores of {model}, Linux {kernel}, load before {load}")
}

fn pid(process: u32) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(process).context("not a process's id")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_time_on_cores_that_are_there() {
        let cores = Cores::of(1).unwrap();
        assert!(!cores.proxy.is_empty() && !cores.rest.is_empty());
        let (before, start) = (cpu_micros(std::process::id()).unwrap(), ticks(&cores.proxy).unwrap());
        let mut sum = 0_u64;
        while cpu_micros(std::process::id()).unwrap() < before + 20_000.0 {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        let end = ticks(&cores.proxy).unwrap();
        assert!(end.0 >= start.0 && end.1 >= start.1 && end.1 - end.0 >= start.1 - start.0);
    }
}
