"""What flows through the compiler, as data: graphs, programs, actions, problems, errors."""
