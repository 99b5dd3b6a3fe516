//! Child processes that can't outlive the process that started them, however that one ends.
//!
//! Linux sends the parent-death signal when the *thread* that forked exits, not the process: so every child is forked
//! by one thread that lives as long as the process does, and not by a test's own thread.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::DEADLINE;

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts `command`; the kernel kills it (SIGKILL) when this process ends.
pub fn spawn(mut command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    // SAFETY: between fork and exec only prctl and getppid run: both are async-signal-safe, neither allocates.
    unsafe {
        command.pre_exec(|| {
            #[cfg(target_os = "linux")]
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                // The asker waits below for this answer, so there is always one to take it.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, child) = mpsc::channel();
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    spawner.lock().unwrap_or_else(|e| e.into_inner()).send((command, answer)).map_err(|_| gone(()))?;
    child.recv().map_err(|_| gone(()))?
}

/// Asks `child` to end, and ends it when it has not after `patience`. Leaves no zombie.
pub fn terminate(child: &mut Child, patience: Duration) -> io::Result<ExitStatus> {
    signal(child, Signal::SIGTERM)?;
    let start = Instant::now();
    while start.elapsed() < patience {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()
}

/// Sends `child` a signal, if it has not ended.
pub fn signal(child: &mut Child, signal: Signal) -> io::Result<()> {
    // Not reaped yet, so the id is still this child's: no other process can be hit.
    if child.try_wait()?.is_none() {
        let id = i32::try_from(child.id()).map_err(io::Error::other)?;
        kill(Pid::from_raw(id), signal)?;
    }
    Ok(())
}

/// Stops `child` (SIGSTOP), if it has not ended, and waits until nothing runs in it any more: its threads stop one by one,
/// and some that run on other cores go on for a while.
pub fn freeze(child: &mut Child) -> io::Result<()> {
    signal(child, Signal::SIGSTOP)?;
    let id = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        // The parent is told once the last of them has stopped.
        if let WaitStatus::Stopped(..) = waitpid(id, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG))? {
            break;
        }
        if start.elapsed() > DEADLINE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not stop"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
