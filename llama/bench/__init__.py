"""How fast a model runs, beside what the machine could do and beside its peers: `codellama bench`.

Figures of speed are cheap to print and hard to trust: the machine is shared, clocks change, and a variant that is
measured ten minutes after another has met another machine. So everything that is to be compared is measured in turns,
round by round; what is quoted is the ratio within a round; and the machine's own limits, how fast it reads memory and
multiplies, are measured in the same rounds. The README beside this file states every protocol.

    from llama.bench.rounds import Timer, interleave, ratios, spread, timed

    seconds = interleave({"one": timed(one), "other": timed(other)}, rounds=7, timer=Timer())
    spread(ratios(seconds["other"], seconds["one"])).median  # how many times as fast is the one?
"""
