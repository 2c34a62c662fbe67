# SPDX-License-Identifier: Apache-2.0
"""Eight worked word problems for few-shot prompts, written for this project."""

SHOTS = (
    {
        "question": "A library has 48 novels and 17 atlases. It lends out 29 of the novels. How many books are left?",
        "response": "There are 48 - 29 = 19 novels left. With the atlases that makes 19 + 17 = 36 books. "
        "The final answer is 36",
    },
    {
        "question": "Mira bakes 6 trays of 8 rolls and sells them at 3 for $2. What does she earn if all are sold?",
        "response": "She bakes 6 * 8 = 48 rolls. That is 48 / 3 = 16 groups of three, each brings $2, so she earns "
        "16 * 2 = $32. The final answer is 32",
    },
    {
        "question": "A rope of 90 metres is cut so that one piece is twice as long as the other. How long is the "
        "short piece?",
        "response": "The two pieces are 1 + 2 = 3 short lengths. So the short piece is 90 / 3 = 30 metres. "
        "The final answer is 30",
    },
    {
        "question": "Omar cycles 12 kilometres on each of 5 days and 20 kilometres on Saturday. How far does he cycle "
        "that week?",
        "response": "On the five days he cycles 12 * 5 = 60 kilometres. With Saturday it is 60 + 20 = 80 kilometres. "
        "The final answer is 80",
    },
    {
        "question": "A coat costs $120. It is reduced by 25%, and then a coupon takes off another $10. What is paid?",
        "response": "A quarter of 120 is 30, so the reduced price is 120 - 30 = $90. With the coupon it is "
        "90 - 10 = $80. The final answer is 80",
    },
    {
        "question": "Lena is 4 years older than her brother. In 6 years their ages will add up to 36. How old is Lena "
        "now?",
        "response": "Now their ages add up to 36 - 2 * 6 = 24. Without the 4 years of difference it would be "
        "24 - 4 = 20, so the brother is 10 and Lena is 10 + 4 = 14. The final answer is 14",
    },
    {
        "question": "A tank holds 500 litres. A pump fills it at 35 litres a minute while 10 litres a minute leak "
        "out. How many minutes until the empty tank is full?",
        "response": "Each minute the tank gains 35 - 10 = 25 litres. It is full after 500 / 25 = 20 minutes. "
        "The final answer is 20",
    },
    {
        "question": "There are 7 boxes with 24 pencils each. They are shared equally among 12 pupils. How many "
        "pencils does each pupil get?",
        "response": "There are 7 * 24 = 168 pencils. Each pupil gets 168 / 12 = 14 of them. The final answer is 14",
    },
)
