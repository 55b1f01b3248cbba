//! The communicator of processes of one host, with ranks as threads of this process ([`threads`]) and as processes of their own
//! ([`processes`]).

mod processes;
mod support;
mod threads;
