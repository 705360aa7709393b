"""What else a pass tells, from work that it does anyway."""
