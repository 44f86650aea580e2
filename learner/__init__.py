"""The training side: coordinator, replay queue, PPO on DeepSpeed, snapshots out."""
