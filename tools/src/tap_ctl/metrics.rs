//! `metrics`: one exposition of all tapdisks of the host.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use tapdisk::metrics::ProcessMetrics;
use tapdisk::metrics::text::Exposition;
use tapdisk::text::one_line;

use super::collect::{Answer, Collector};

/// How long a tapdisk may take to answer before it counts as one that hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// Prints it. A tapdisk that does not answer is in it as one that is not up.
pub(super) fn metrics(out: &mut impl Write, directory: &Path, json: bool) -> io::Result<()> {
    let answers = Collector::of_metrics(directory).round(PATIENCE)?;
    let processes = answers.into_iter().filter_map(|(pid, answer)| match answer {
        // Whatever it says its id is.
        Answer::Told(process) => Some(ProcessMetrics { pid, ..process }),
        Answer::Hangs(_) => Some(ProcessMetrics { pid, ..ProcessMetrics::default() }),
        Answer::Refused(why) => {
            eprintln!("process {pid}: {}", one_line(&why));
            None
        }
    });
    let processes: Vec<_> = processes.collect();
    if json {
        return writeln!(out, "{}", serde_json::to_string(&processes)?);
    }
    write!(out, "{}", Exposition(&processes))
}
