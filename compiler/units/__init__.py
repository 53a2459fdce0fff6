"""Units: runs of operators that go to one stage, what each may keep, and what that costs."""
