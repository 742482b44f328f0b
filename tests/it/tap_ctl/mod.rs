//! `tap-ctl`: its output, the life of disks, its own death.

mod killed;
mod life;
mod output;
