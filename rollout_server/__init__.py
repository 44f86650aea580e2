"""The inference side: runs episodes on an engine, streams groups of trajectories, receives weight snapshots."""
