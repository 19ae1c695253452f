"""What the exit status of a command means."""

DONE, FAILED, MISUSED, BELOW, FAULT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 70, 130, 141
STATUS = {
    DONE: "done",
    FAILED: "refused or failed; a typed error says what, where and what to do",
    MISUSED: "arguments that the command does not take",
    BELOW: "quality: a picture or a mean is below what --require says",
    FAULT: "a fault of toma-fx: please report it",
    INTERRUPTED: "interrupted; builds, quality, tune and generate go on where they were",
    PIPE_CLOSED: "nobody reads the output any more",
}
