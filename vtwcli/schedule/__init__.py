"""What is done with visual tokens, and where."""

from vtwcli.schedule.schedule import Freeze, Keep, Mute, Schedule, Select, When, Withdraw

__all__ = ["Freeze", "Keep", "Mute", "Schedule", "Select", "When", "Withdraw"]
