"""A small world of Python exercises, made by a seeded generator: tasks, many renderings of each, and their tests.

Six million parameters can't learn all of Python, and can learn a small world well. Here is one: pipelines of filters,
maps and aggregates over a dozen kinds of data, chains of changes, decisions, small classes, and classics written by
hand. What is rendered is run against its tests (`llama.evals.sandbox`), and only what passes is learned from.

    from llama.train.exercises.stream import exercises

    for exercise in exercises(seed="0"):
        print(exercise.code())
"""
