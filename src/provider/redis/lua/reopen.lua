-- Making finished deliveries wait again, as a part of the scripts that do it.

-- Makes a delivery that is loaded wait again, with fresh budgets. Its event's progress must be loaded.
local function reopen(sub, seq, d, is_replay)
  local p = progress[seq]
  p[1] = p[1] + 1
  if d[STAGE] == DEAD then
    p[3] = p[3] - 1
    call('ZREM', P .. 'dead', seq .. ':' .. sub)
  end
  d[STAGE], d[DUE], d[COMPLETED], d[TRIES], d[INFRA] = PENDING, now, 0, 0, 0
  if is_replay then d[REPLAY] = 1 end
  changed[sub][seq] = true
  count('dp', 1)
  if d[KEYED] == 1 then open_key(sub, seq, d[KEY]) end
  line_up(sub, seq, d)
end

-- The event gets another delivery: from here on what is known of it stands in its progress, which the caller changes.
local function end_sole(seq, event)
  progress[seq][7] = nil
  for _, sub in ipairs(subs_of(event)) do
    local d = deliveries[sub][seq]
    if d and d[SOLE] == 1 then
      d[SOLE], changed[sub][seq] = 0, true
    end
  end
end

-- The progress of a completed event is not kept: how many of its deliveries were begun is counted anew.
local function load_begun(seq, event)
  local subs = subs_of(event)
  for _, sub in ipairs(subs) do
    load_deliveries(sub, { seq })
  end
  load_progress({ seq }, subs[1])
  local p = progress[seq]
  if p[1] > 0 or p[2] > 0 or p[3] > 0 then return end
  local begun = 0
  for _, sub in ipairs(subs) do
    local d = deliveries[sub][seq]
    if d and d[STARTED] > 0 then begun = begun + 1 end
  end
  p[2], p[5] = begun, begun
end
