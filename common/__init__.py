"""The contract between processes: trajectories, snapshots, messages and how they travel. Never imports torch."""
