def cgroup_oom_kills():
    return None


def kernel_oom_kills():
    for l in open("/proc/vmstat"):
        if l.startswith("oom_kill "):
            return int(l.split()[1])
