"""What `heedful verify` does: the contract suite on this machine, each backend in a process of its own.

`features` are the rows of the matrix, `choice` says which checks are made, `job` is what one worker is to do, `worker`
does it, `child` is the process that it runs in, `run` collects what comes back, `record` keeps it as data, `page` draws
it, `speed` times what is right.
"""
