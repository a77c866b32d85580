"""How a process runs: exit codes and signals, files, devices, several processes on one job."""
